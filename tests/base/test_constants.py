"""Values that a computation holds constant."""

import pytest
import torch

from hf_flops.base.constants import Constants, same_values


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x.detach()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def detached(x):
    return x * x.detach()


def inside(x):
    with torch.no_grad():
        weight = x.square() + 1
    return x * weight


def number(x):
    return x * x.sum().item()


def free(x):
    with torch.no_grad():
        same = x.contiguous()  # x itself
        _ = (x + 1).mean()  # which nothing reads
    return Double.apply(x) * same


@pytest.mark.parametrize("function", [detached, inside, number, free])
def test_the_values_are_those_without_a_gradient(function):
    start, end = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (2.0, 2.001))
    with Constants() as constants:
        before = function(start)
    with Constants(constants.values) as moved:
        after = function(end)
    (slope,) = torch.autograd.grad(before.sum(), start)
    assert float((after - before).detach() / 0.001) == pytest.approx(float(slope), rel=1e-3)
    assert same_values(constants.values, moved.values) == (function is free)


def test_other_values_than_before_are_refused():
    with pytest.raises(ValueError, match="other values constant"), Constants([]):
        detached(torch.ones(1))
