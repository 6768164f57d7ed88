"""Losses that compare rows with each other: one row's outputs replaced at a time."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_flops.base.batch import ROW
from hf_flops.objectives import CoupledLoss, RowLossError

X = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 1.0], [2.0, 2.0]])


def encoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(2, 2)


def spread(model, inputs, weight=None):
    """The spread of the outputs, compared with what the model says of other inputs."""
    with torch.no_grad():
        other = model(-inputs["x"]).mean()
    outputs = model(inputs["x"])
    outputs = outputs if weight is None else outputs @ weight
    return (outputs - other).square().mean() + outputs.var(0, correction=0).sum(), None


def bound(loss, *parts):
    """Return the objective of a batch whose clean rows run in parts, and its clean losses."""
    objective = CoupledLoss(loss, loss, {"x": X[:2]})
    for part in parts:
        rows = torch.arange(len(X))[part]
        clean = objective(loss, {"x": X[part], ROW: rows})
    clean = clean if len(parts) == 1 else objective(loss, {"x": X})
    return objective.bind_batch(clean, {"x": X, ROW: torch.arange(len(X))})


@torch.no_grad()
@pytest.mark.parametrize("parts", [[slice(0, 4)], [slice(0, 3), slice(3, 4)]])
@pytest.mark.parametrize("weight", [None, torch.eye(2)])  # which is in 32 bits
def test_a_row_is_replaced_in_the_loss_of_its_batch(parts, weight):
    model = encoder()
    loss = partial(spread, model, weight=weight)
    objective, clean = bound(loss, *parts)
    start = float(loss({"x": X})[0])
    assert clean.sums.tolist() == pytest.approx([start] * 4)
    assert objective.dtype == (torch.float64 if weight is None else torch.float32)
    owner = torch.tensor([2, 0])
    found = objective(loss, {"x": X[owner] + 0.1, ROW: owner})
    for value, row in zip(found.sums.tolist(), owner.tolist(), strict=True):
        outputs = model(X)
        outputs[row] = model(X[row] + 0.1)
        other = model(-X).mean()  # it stays that of the clean rows
        moved = (outputs - other).square().mean() + outputs.var(0, correction=0).sum()
        assert value - start == pytest.approx(4 * (float(moved) - start), rel=1e-3)


@torch.no_grad()
def test_calls_without_gradients_are_not_made_again():
    model, calls = encoder(), list[int]()
    loss = partial(spread, model)
    objective, _ = bound(loss, slice(0, 4))
    model.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    objective(loss, {"x": X[:3], ROW: torch.arange(3)})
    assert calls == [3]


@torch.no_grad()
def test_a_loss_that_reads_parameters_itself_is_refused():
    model = encoder()

    def loss(inputs):
        outputs = model(inputs["x"])
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs))) * scale, None

    scale = nn.Parameter(torch.ones(()))
    objective = CoupledLoss(loss, loss, {"x": X[:2]})
    scale.data.mul_(2)
    with pytest.raises(RowLossError, match="when only the parameters change"):
        objective.check_elsewhere()


@torch.no_grad()
def test_outputs_that_depend_on_other_rows_are_refused():
    first, last = encoder(), nn.Linear(2, 1)

    def loss(inputs):
        mixed = first(inputs["x"])
        return last(mixed - mixed.mean(0)).square().mean(), None

    with pytest.raises(RowLossError, match="depend on the other rows"):
        CoupledLoss(loss, loss, {"x": X[:2]})
