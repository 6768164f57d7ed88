"""The chain from losses to deltas: its order, and the seam between the clean pass and the
queries.
"""

import torch

from hf_flops import BatchPosition, CallableObjective, Method, estimate_gradient
from hf_flops.allocators import Uniform
from hf_flops.base.rows import expand
from hf_flops.core.clean_forward import clean_pass
from hf_flops.core.estimate import estimate_from, transforms
from hf_flops.estimators import (
    Antithetic,
    Chain,
    DeltaTransform,
    FiniteDifference,
    LeaveOneOut,
    LogitJacobian,
    OneSided,
)
from hf_flops.estimators.delta_chain import ChunkDeltas, Evaluation
from hf_flops.objectives import RowLosses, TappedLoss
from hf_flops.perturbations import ParameterVector, perturb
from tests.estimators.test_control_variate import Softmax, batch
from tests.helpers.tiny import generator, model_forward


class Times(DeltaTransform):
    """Multiplies the deltas of chunks and adds to those of a round."""

    def __init__(self, factor):
        self.factor = factor

    def of_chunk(self, deltas, seen):
        return ChunkDeltas(deltas.values * self.factor)

    def of_round(self, deltas, rows):
        return deltas + self.factor


def made(model, **options):
    defaults = {
        "objective": TappedLoss(logits=True),
        "perturbation": perturb(
            model, rowwise=ParameterVector.of(model).names, distribution="rademacher"
        ),
        "estimator": OneSided(),
        "allocator": Uniform(),
        "queries_per_sample": 4,
        "scale": 1e-3,
        "rows_per_forward": 7,
    }
    return Method(**{**defaults, **options})


def test_transforms_follow_each_other_and_those_that_define_nothing_change_nothing():
    rows = expand(torch.tensor([2, 1]), 1.0)
    losses = torch.randn(2, 3, generator=generator(1)).double()
    seen = Evaluation(rows, None, losses, torch.ones(3), (None, None), 1)
    chain = Chain(
        [FiniteDifference(Antithetic(), None, 0.5), DeltaTransform(), Times(3.0), LeaveOneOut(2)]
    )
    deltas = chain.of_chunk(ChunkDeltas(losses), seen)
    torch.testing.assert_close(deltas.values, 3 * (losses[0] - losses[1]).float())
    other = deltas.values + 3
    found = chain.of_round(deltas.values, rows)
    assert rows.owner.tolist() == [0, 1, 0]
    torch.testing.assert_close(
        found, torch.stack([other[0] - other[2] / 2, other[1], other[2] - other[0] / 2])
    )
    assert chain.means(torch.ones(2)) == []
    assert chain.statistics() == []


def test_a_clean_loss_is_the_baseline_of_its_own_rows():
    rows = expand(torch.tensor([1, 2]), 1.0)
    clean, losses = torch.tensor([10.0, 20.0]), torch.tensor([[11.0, 22.0, 23.0]])
    seen = Evaluation(rows, None, losses, torch.ones(3), (None,), 1)
    deltas = FiniteDifference(OneSided(), clean, 0.5).of_chunk(ChunkDeltas(losses), seen)
    assert deltas.values.tolist() == [2.0, 4.0, 6.0]


def test_the_elements_of_a_chain_are_those_that_the_method_asks_for():
    def names(**options):
        method = made(model := Softmax(), **options)
        with torch.no_grad(), method.reuse.recording(model_forward(model)) as recording:
            found = transforms(clean_pass(recording, batch(), method, BatchPosition()))
        return [type(transform).__name__ for transform in found.transforms]

    steps = CallableObjective(lambda outputs, inputs: -outputs.logits.argmax(-1).float())
    steps.piecewise_constant = True
    assert names() == ["FiniteDifference"]
    assert names(control=LogitJacobian()) == ["FiniteDifference", "Residual"]
    assert names(objective=steps) == ["FiniteDifference", "LeaveOneOut"]


def test_other_losses_may_be_known_between_the_clean_pass_and_the_queries():
    class Shifted(TappedLoss):
        def __call__(self, forward, inputs, *, features=False):
            found = super().__call__(forward, inputs, features=features)
            return RowLosses(2 * found.sums + 1, found.counts, found.residuals)

    model = Softmax()
    forward, inputs, place = model_forward(model), batch(), BatchPosition(seed=4)
    estimate_gradient(forward, inputs, made(model, objective=Shifted()), place)
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    method = made(model)
    with torch.no_grad(), method.reuse.recording(forward) as recording:
        clean = clean_pass(recording, inputs, method, place)
        before = clean.losses
        other = RowLosses(2 * before.sums + 1, before.counts, before.residuals)
        result = estimate_from(clean.judged_by(Shifted(), other))
    assert clean.losses is before
    assert all(
        parameter.grad.equal(own) for parameter, own in zip(model.parameters(), wanted, strict=True)
    )
    torch.testing.assert_close(result.loss.double(), other.sums.mean(), rtol=1e-6, atol=0)
