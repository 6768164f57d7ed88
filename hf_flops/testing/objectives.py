"""What every objective must do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..base.batch import batch_size, take
from ..objectives import Forward, Objective, RowLosses


class ObjectiveContract:
    """Derive a class `Test...` that defines `make`; pytest then runs the contract.

    Examples:
        >>> from hf_flops.objectives import CallableObjective
        >>> class TestSquares(ObjectiveContract):
        ...     def make(self):
        ...         objective = CallableObjective(lambda outputs, inputs: outputs.square().sum(1))
        ...         batch = {"x": torch.ones(3, 2)}
        ...         return objective, lambda inputs: (None, 2 * inputs["x"]), batch
        >>> TestSquares().test_rows_do_not_depend_on_each_other()
    """

    tolerance = 1e-5  # relative

    def make(self) -> tuple[Objective, Forward, Mapping[str, Any]]:
        """Return the objective, what runs a model, and a batch of three samples or more."""
        raise NotImplementedError("Define make(self), which returns (objective, forward, inputs).")

    @torch.no_grad()
    def test_losses_have_an_entry_per_row(self) -> None:
        """Sums, in 32 bits or more, and counts are (R,), or (1,) for the batch as a whole."""
        objective, forward, inputs = self.make()
        losses = objective(forward, inputs)
        entries = batch_size(inputs) if objective.per_row else 1
        assert losses.sums.shape == losses.counts.shape == (entries,), (
            f"{tuple(losses.sums.shape)} sums, {entries} wanted"
        )
        assert losses.sums.dtype in (torch.float32, torch.float64), (
            f"16-bit losses have no digits left: {losses.sums.dtype}"
        )
        assert bool((losses.counts >= 0).all()), "a row has a negative number of loss elements"

    @torch.no_grad()
    def test_rows_do_not_depend_on_each_other(self) -> None:
        """A sample's loss is the same in any order, repeated, or alone: rows are chunked freely."""
        objective, forward, inputs = self.make()
        if not objective.per_row or objective.needs_clean:
            return
        whole = objective(forward, inputs)
        for index in ([2, 0, 1], [0, 0, 2, 0], [1]):
            rows = torch.tensor(index)
            losses = objective(forward, take(inputs, rows))
            wanted = whole.sums[rows.to(whole.sums.device)]
            self.assert_close(losses.sums, wanted, f"the losses of samples {index}")

    @torch.no_grad()
    def test_inputs_and_the_global_generator_are_left_alone(self) -> None:
        """Losses of the same parameters can be had again."""
        objective, forward, inputs = self.make()
        before = {name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)}
        state, first = torch.get_rng_state(), objective(forward, inputs)
        assert torch.equal(state, torch.get_rng_state()), "the global generator has moved"
        for name, value in before.items():
            assert torch.equal(value, inputs[name]), f"the input {name} has changed"
        self.assert_close(
            objective(forward, inputs).sums, first.sums, "the losses of a second call"
        )

    @torch.no_grad()
    def test_the_surrogate_has_a_loss_per_row_too(self) -> None:
        """Checks of the first batch look at the surrogate: it must not be piecewise constant."""
        objective = self.make()[0]
        surrogate = objective.surrogate
        assert surrogate.per_row == objective.per_row
        assert not objective.piecewise_constant or not surrogate.piecewise_constant, (
            "the surrogate moves in steps itself"
        )

    @torch.no_grad()
    def test_clean_rows_keep_their_number_when_a_batch_is_bound(self) -> None:
        """`settled` returns an objective, and losses of the same rows."""
        objective, forward, inputs = self.make()
        clean = objective(forward, inputs, features=True)
        bound, losses = objective.bind_batch(clean, inputs)
        assert isinstance(bound, Objective)
        assert isinstance(losses, RowLosses)
        assert losses.sums.shape == clean.sums.shape

    def assert_close(self, losses: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
        """Compare losses (R,); rows that are not finite must be so in both."""
        same = torch.allclose(
            losses.double(),
            wanted.double(),
            rtol=self.tolerance,
            atol=self.tolerance,
            equal_nan=True,
        )
        assert same, f"{what} are {losses.tolist()}, not {wanted.tolist()}"
