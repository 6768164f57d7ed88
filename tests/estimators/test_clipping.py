"""Clipped deltas: what is limited, what is left alone, and that the estimate is made of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_flops import BatchPosition, ConfigurationError
from hf_flops.base.rows import expand
from hf_flops.estimators.clipping import Clipping
from hf_flops.perturbations import ParameterVector, perturb
from hf_flops.perturbations.replay import regenerate
from tests.helpers.quadratic import Quadratic, one_estimate, quadratic_batch

ODD = st.sampled_from([0.0, float("nan"), float("inf"), -float("inf")])
DELTAS = st.lists(st.floats(-1e4, 1e4, width=32) | ODD, min_size=1, max_size=20).map(torch.tensor)


@given(DELTAS, st.floats(0.1, 5))
def test_deltas_keep_their_sign_and_order_and_those_that_are_not_finite_stay(deltas, most):
    clipped = Clipping(most).of_round(deltas, expand(torch.tensor([len(deltas)]), 1.0))
    finite = deltas.isfinite()
    assert torch.equal(clipped.isfinite(), finite)
    before, after = deltas[finite], clipped[finite]
    assert (after.abs() <= before.abs()).all()
    assert (after * before >= 0).all()
    bound = most * 1.4826 * before.abs().median() if len(before) else 0
    assert bound == 0 or (after.abs() <= bound * (1 + 1e-6)).all()
    kept = before.abs() <= bound
    assert after[kept].equal(before[kept])


def test_a_normal_spread_is_measured_as_such_whatever_the_outliers():
    deltas = 3 * torch.randn(10_001, generator=torch.Generator().manual_seed(0))
    deltas[:500] *= 1e6
    clipped = Clipping(1.5).of_round(deltas, expand(torch.tensor([len(deltas)]), 1.0))
    assert float(clipped.abs().max()) == pytest.approx(4.5, rel=0.1)


def test_zeros_of_a_piecewise_constant_loss_do_not_stop_everything():
    deltas = torch.tensor([0.0, 0.0, 0.0, 5.0, -2.0])
    assert Clipping(1.0).of_round(deltas, expand(torch.tensor([5]), 1.0)).equal(deltas)


def test_the_estimate_is_the_noise_of_rows_times_their_clipped_deltas():
    model, inputs = Quadratic(), quadratic_batch()
    _, plain = one_estimate(model, inputs)
    gradient, result = one_estimate(model, inputs, delta_clip=1.0)
    assert result.rows == plain.rows
    record = plain.trace
    clipped = Clipping(1.0).of_round(record.coefficients / record.rows.weight, record.rows)
    assert not clipped.equal(record.coefficients / record.rows.weight)
    vector = ParameterVector.of(model)
    update = regenerate(
        perturb(model, rowwise=vector.names, distribution="gaussian"),
        BatchPosition().seed,
        0,
        record.rows.owner,
        record.rows.query,
        clipped * record.rows.weight,
        record.rows.group,
        99,
    )
    torch.testing.assert_close(gradient, update / record.normalizer, rtol=1e-5, atol=1e-6)


def test_rows_that_would_run_again_are_refused():
    with pytest.raises(ConfigurationError, match=r"delta_clip=1\.5 changes rows that have run"):
        one_estimate(Quadratic(), quadratic_batch(), kind="activation", delta_clip=1.5)
