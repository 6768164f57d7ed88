"""What deltas of objectives in steps are measured against: unbiased still, and with less
variance.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_flops import CallableObjective
from hf_flops.allocators import TwoStage, Uniform
from hf_flops.base.rows import expand
from hf_flops.estimators.differences import against_others
from tests.helpers.quadratic import Fixed, one_estimate
from tests.helpers.tiny import generator

SAMPLES, SCALE = 5, 0.7


class Right(CallableObjective):
    """Whether a score is positive, to be maximised."""

    piecewise_constant = True

    def __init__(self):
        super().__init__(lambda outputs, inputs: -(outputs > 0).float())


def scores(width=3):
    model = nn.Linear(width, 1)
    with torch.no_grad():
        model.weight.copy_(0.4 * torch.randn(1, width, generator=generator(2)))
        model.bias.fill_(0.1)
    inputs = {
        "features": torch.randn(SAMPLES, width, generator=generator(3)),
        "labels": torch.zeros(SAMPLES),
    }
    return model, inputs


def estimates(count, objective=None, width=3, **options):
    model, inputs = scores(width)
    found = []
    for step in range(count):
        options |= {
            "forward": lambda batch: (None, model(batch["features"]).squeeze(-1)),
            "rows_per_forward": 99,
        }
        options |= {"objective": objective or Right(), "scale": SCALE}
        found.append(one_estimate(model, inputs, step=step, **options)[0])
    return torch.stack(found)


@given(data=st.data(), counts=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_each_delta_is_measured_against_the_others_of_its_sample(data, counts):
    rows = expand(torch.tensor(counts), 1.0)
    value = st.one_of(st.sampled_from([-2.0, 0.0, 2.0, float("nan")]), st.floats(-5, 5))
    deltas = torch.tensor(data.draw(st.lists(value, min_size=len(rows), max_size=len(rows))))
    found = against_others(deltas, rows, len(counts))
    for row, (delta, owner) in enumerate(zip(deltas.tolist(), rows.owner.tolist(), strict=True)):
        others = [
            other
            for index, (other, of) in enumerate(
                zip(deltas.tolist(), rows.owner.tolist(), strict=True)
            )
            if of == owner and index != row and not math.isnan(other)
        ]
        expected = delta - sum(others) / (len(others) + 1)
        assert found[row].item() == pytest.approx(expected, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize(
    ("kind", "allocator"),
    [("shared", Fixed([1, 2, 1, 5, 6])), ("rowwise", TwoStage())],
    ids=["uneven counts of shared noise", "two rounds of noise per row"],
)
def test_the_mean_of_many_estimates_is_the_gradient_of_the_smoothed_objective(kind, allocator):
    model, inputs = scores()
    extended = torch.cat([inputs["features"], torch.ones(SAMPLES, 1)], 1)
    margins, spread = model(inputs["features"]).detach(), SCALE * extended.norm(dim=1, keepdim=True)
    density = (-0.5 * (margins / spread).square()).exp() / (spread * math.sqrt(2 * math.pi))
    # of -Phi(margin / spread), which is the chance to be right
    wanted = -(density * extended).mean(0)
    found = estimates(300, kind=kind, allocator=allocator, queries_per_sample=4)
    error = found.mean(0) - wanted
    assert (error.abs() < 4.5 * found.std(0) / len(found) ** 0.5).all()


def test_the_variance_is_what_the_formula_says():
    queries, width = 8, 40
    model, inputs = scores(width)
    plain = CallableObjective(Right().function)  # the same without a word about steps
    options = {"allocator": Uniform(), "queries_per_sample": queries + 1, "width": width}
    ours, before = (
        float(estimates(200, objective, **options).var(0).sum()) for objective in (None, plain)
    )
    extended = torch.cat([inputs["features"], torch.ones(SAMPLES, 1)], 1)
    margins = model(inputs["features"]).detach().squeeze(-1)
    p = 0.5 * (1 + torch.erf(margins / (SCALE * extended.norm(dim=1)) / 2**0.5))
    clean, v = (margins > 0).float(), p * (1 - p)
    old = v + (p - clean).square()
    new = v * (1 + (queries - 1) / queries**2) + (p - clean).square() / queries**2
    # d numbers of noise multiply the square of a delta by about d, which is large beside the
    # squared gradient.
    assert ours / before == pytest.approx(float(new.sum() / old.sum()), rel=0.15)
    assert ours < 0.85 * before


def test_rows_that_fail_count_for_nothing():
    model, inputs = scores()

    def forward(batch):
        outputs = model(batch["features"]).squeeze(-1)
        return None, torch.where(outputs < -0.8, torch.nan, outputs)  # under some noise

    class Fails(Right):
        def __init__(self, piecewise_constant):
            self.piecewise_constant, self.per_row = piecewise_constant, True
            self.function = lambda outputs, inputs: torch.where(
                outputs.isnan(), torch.nan, -(outputs > 0).float()
            )

    def totals(piecewise_constant):
        gradient, result = one_estimate(
            model,
            inputs,
            objective=Fails(piecewise_constant),
            scale=SCALE,
            forward=forward,
            queries_per_sample=9,
        )
        assert gradient.isfinite().all()
        assert result.metrics["dropped_rows"] > 0
        return torch.zeros(SAMPLES).index_add_(
            0, result.trace.rows.owner, result.trace.coefficients
        )

    plain, ours = totals(False), totals(True)
    seen = plain != 0
    kept = plain[seen] / ours[seen]  # what is left of the sum of n deltas is the n-th part
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-3)
    assert len(kept) > 2
    assert kept.min() < 8
