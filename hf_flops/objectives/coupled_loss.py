"""Any loss of a whole batch, as a function of one row at a time: the rows' outputs of the model
are replaced one by one.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_unflatten

from ..base.batch import ROW, Inputs, batch_size, take
from ..base.calls import Leaf, Tape
from ..base.constants import Constants, Value
from ..base.probe import Attempt
from .base import Forward, Objective, RowLosses
from .model_loss import RowLossError
from .row_loss import modules_with_rows, row_failures, scalar

_SAME = 1e-4  # relative error of a loss that is computed again from recorded outputs


class CoupledLoss(Objective):
    """A loss that compares the rows of a batch with each other: contrastive, or with a statistic.

    It is no sum over rows, but its gradient is one: with u_i the model's outputs for row i,
    `dL = sum_i dL/du_i du_i`. A row's loss is that of its batch with the outputs of this one row
    replaced, times the number of rows. The model runs for the row alone, and the loss function for
    the batch.

    Outputs that the loss takes without gradients, inside `torch.no_grad`, and values that it
    detaches stay those of the clean forward, as backpropagation holds them constant.

    Args:
        loss: runs the model and computes the loss, without counting rows.
        forward: the same for whole batches; it may count rows.
        inputs: a batch of two different rows.

    Attributes:
        read: the outputs that the loss depends on, without those it takes as constants.
        constant: calls without gradients, module and number.
        holds: whether the loss function holds values constant itself.

    Raises:
        RowLossError: the loss is no function of outputs that the model has for each row.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from hf_flops.objectives import CoupledLoss
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> def loss(inputs):
        ...     outputs = model(inputs["x"]).squeeze(1)
        ...     return outputs.var(correction=0), None
        >>> inputs = {"x": torch.tensor([[1.0], [3.0]]), "row_of_batch": torch.arange(2)}
        >>> with torch.no_grad():
        ...     objective = CoupledLoss(loss, loss, {"x": inputs["x"]})
        ...     clean = objective(loss, inputs)
        ...     objective, losses = objective.bind_batch(clean, inputs)
        >>> losses.sums.mean()
        tensor(1., dtype=torch.float64)
    """

    needs_clean = numbered = True

    def __init__(self, loss: Forward, forward: Forward, inputs: Inputs) -> None:
        self.loss = loss
        self.modules = modules_with_rows(forward, inputs)
        # float64, in which one row of many still shows, if the loss function can be computed in it
        self.dtype = torch.float64
        # parts of the clean forward, then what is bound: recorded outputs, their inputs and loss,
        # and the values held constant
        self._parts = list[Tape]()
        self._clean: Tape | None = None
        self._inputs: Inputs = {}
        self._start = torch.zeros(())
        self._held: list[Value] | None = None
        tape = Tape(self.modules)
        with torch.enable_grad(), tape.recording():
            wanted = scalar(forward(inputs)[0])
        self.constant = tape.constant
        with row_failures("the loss cannot be computed from recorded outputs"):
            with Attempt(None) as attempt:
                found = self._played(tape, inputs)
            if attempt.reason is not None:
                self.dtype = torch.float32
            constants = Constants()
            found = self._played(tape, inputs, constants=constants)
            self.holds = bool(constants.values)
            self.read = self._leaves_read(tape, inputs, found)
        self._require(found, wanted, "it is computed from recorded outputs")
        self._require_independent(forward, inputs, tape)
        self._proof: tuple[Tape, Inputs, Tensor] | None = (tape, inputs, wanted)

    def check_elsewhere(self) -> None:
        """Check that the parameters enter the loss by the model's outputs only, now that they are
        other ones.

        Raises:
            RowLossError: the loss reads them itself.
        """
        if self._proof is None:
            return
        tape, inputs, wanted = self._proof
        self._require(self._played(tape, inputs), wanted, "only the parameters change")
        self._proof = None

    def __call__(self, forward: Forward, inputs: Inputs, *, features: bool = False) -> RowLosses:
        """See `Objective`; before a batch is bound, a row's loss is a smooth function of all that
        the loss depends on, for the checks of the first batch.
        """
        del features
        tape = Tape(self.modules)
        if self._clean is not None:
            with tape.recording(partial(self._known, inputs[ROW])):
                forward(inputs)
            return self._replaced(tape, inputs[ROW])
        with tape.recording():
            forward(inputs)
        if ROW not in inputs:
            return self._projected(tape, batch_size(inputs))
        if int(inputs[ROW][0]) == 0:
            self._parts.clear()
        self._parts.append(tape)
        zeros = torch.zeros(batch_size(inputs), dtype=torch.float64)
        return RowLosses(zeros, torch.ones_like(zeros))

    def bind_batch(self, clean: RowLosses, inputs: Inputs) -> tuple[CoupledLoss, RowLosses]:
        """See `Objective.bind_batch`: the other rows' outputs are those of the clean forward."""
        bound = copy.copy(self)
        bound._clean, bound._inputs, bound._parts = self._joined(), without_numbers(inputs), []
        self._parts.clear()
        constants = Constants() if self.holds else None
        with row_failures("the loss cannot be computed from recorded outputs"):
            bound._start = bound._played(bound._clean, bound._inputs, constants=constants)
        bound._held = None if constants is None else constants.values
        sums = bound._start.double().cpu().expand(len(clean.sums)).clone()
        return bound, RowLosses(sums, torch.ones_like(sums))

    def _played(
        self,
        tape: Tape,
        inputs: Inputs,
        changed: dict[Leaf, Tensor] | None = None,
        constants: Constants | None = None,
    ) -> Tensor:
        """Return the loss of a batch with recorded outputs, some of them changed."""

        def change(name: Leaf, leaf: object) -> object:
            if not torch.is_tensor(leaf):
                return leaf
            leaf = leaf if changed is None or name not in changed else changed[name]
            return leaf.to(self.dtype) if leaf.is_floating_point() else leaf

        with torch.enable_grad(), tape.playing(change):  # what is inside `no_grad` then shows
            with nullcontext() if constants is None else constants:
                loss, _ = self.loss(inputs)
            return scalar(loss)

    def _replaced(self, tape: Tape, owner: Tensor) -> RowLosses:
        """Return the losses of rows that each replace the outputs of one row of the batch."""
        assert self._clean is not None
        clean, found = dict(self._clean.leaves()), list[Tensor]()
        rows, samples = len(owner), batch_size(self._inputs)
        noisy = {name: leaf for name, leaf in tape.leaves() if name in self.read}
        with row_failures("the loss cannot be computed with the outputs of one row replaced"):
            for row, sample in enumerate(owner.tolist()):
                changed = {}
                for name, leaf in noisy.items():
                    entries = len(leaf) // rows
                    changed[name] = clean[name].to(self.dtype, copy=True)
                    changed[name][sample * entries : (sample + 1) * entries] = leaf[
                        row * entries : (row + 1) * entries
                    ].to(self.dtype)
                held = None if self._held is None else Constants(self._held)
                found.append(self._played(self._clean, self._inputs, changed, held))
        moved = torch.stack(found).double() - self._start.double()
        sums = (self._start.double() + samples * moved).cpu()
        return RowLosses(sums, torch.ones_like(sums))

    def _projected(self, tape: Tape, rows: int) -> RowLosses:
        """Return a number per row that depends smoothly on what the loss depends on."""
        sums = torch.zeros(rows, dtype=torch.float64)
        for name, leaf in tape.leaves():
            if name in self.read:
                values = leaf.reshape(rows, -1).double().nan_to_num(0.0, 0.0, 0.0).cpu()
                size = values.shape[1]
                sums = sums + values @ torch.arange(size).double().cos() / size**0.5
        return RowLosses(sums, torch.ones_like(sums))

    def _known(self, owner: Tensor, module: torch.nn.Module, number: int) -> object | None:
        """Return a call's outputs for the rows of `owner`, if the loss takes it as a constant."""
        assert self._clean is not None
        if (module, number) not in self.constant:
            return None
        samples, (leaves, spec) = batch_size(self._inputs), self._clean.outputs[module][number]

        def own(leaf: object) -> Any:
            if not torch.is_tensor(leaf):
                return leaf
            values = leaf.unflatten(0, (samples, -1))
            return values[owner.to(leaf.device)].flatten(0, 1)

        return tree_unflatten(tree_map(own, leaves), spec)

    def _joined(self) -> Tape:
        """Return the parts of the clean forward as one."""
        tape = self._parts[0]
        if len(self._parts) == 1:
            return tape
        joined = Tape(self.modules)
        with row_failures("the outputs of a batch cannot be joined"):
            for module, calls in tape.outputs.items():
                joined.outputs[module] = [
                    (
                        [
                            torch.cat([part.outputs[module][number][0][i] for part in self._parts])  # type: ignore[misc]
                            if torch.is_tensor(leaf)
                            else leaf
                            for i, leaf in enumerate(leaves)
                        ],
                        spec,
                    )
                    for number, (leaves, spec) in enumerate(calls)
                ]
        return joined

    def _leaves_read(self, tape: Tape, inputs: Inputs, loss: Tensor) -> frozenset[Leaf]:
        """Return the outputs, constants left out, without which the loss is another."""
        found = set()
        for name, leaf in tape.leaves():
            if name[:2] in self.constant:
                continue
            changed = {
                name: leaf
                * torch.linspace(0.5, 2.0, len(leaf)).to(leaf).view(-1, *[1] * (leaf.dim() - 1))
                + 0.1
            }
            with Attempt(None) as attempt:
                same = bool(self._played(tape, inputs, changed) == loss)
            if attempt.reason is not None or not same:
                found.add(name)
        return frozenset(found)

    def _require(self, found: Tensor, wanted: Tensor, when: str) -> None:
        """Require that a loss is the same."""
        if not abs(float(found) - float(wanted)) <= _SAME * max(1.0, abs(float(wanted))):
            raise RowLossError(f"the loss {float(wanted):.6g} is {float(found):.6g} when {when}")

    def _require_independent(self, forward: Forward, inputs: Inputs, tape: Tape) -> None:
        """Require that the first row's outputs stay the same beside another row."""
        twice = Tape(self.modules)
        with twice.recording():
            forward(take(inputs, torch.tensor([0, 0])))
        alone = dict(twice.leaves())
        for name, leaf in tape.leaves():
            if name not in self.read:
                continue
            entries, other = len(leaf) // 2, alone.get(name)
            first = leaf[:entries].float()
            size = float(first.abs().nan_to_num(0.0, 0.0, 0.0).max())
            if other is None or not torch.allclose(
                other[:entries].float(), first, _SAME, 10 * _SAME * size, equal_nan=True
            ):
                raise RowLossError("the outputs of a row depend on the other rows of its batch")


def without_numbers(inputs: Inputs) -> dict[str, Any]:
    """Return inputs without the rows' numbers."""
    return {name: value for name, value in inputs.items() if name != ROW}
