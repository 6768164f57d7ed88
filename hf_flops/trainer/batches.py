"""From the inputs that the stock trainer loads to the batches of an optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..autotune.protocol import Averaging, Batch, GradientSession
from ..base.batch import ROW, Inputs, batch_size
from ..base.rows import BatchPosition
from ..core.method import StepResult
from ..errors import ObjectiveError
from ..objectives import Forward
from .layout import rows_together

if TYPE_CHECKING:
    from .trainer import FlopsTrainerMixin

SAMPLE_ID = "sample_id"


def without_ids(inputs: Inputs) -> tuple[Inputs, tuple[int, ...] | None]:
    """Return the inputs of the model and the numbers of the samples, if there are any."""
    if not isinstance(inputs, Mapping) or SAMPLE_ID not in inputs:
        return inputs, None
    ids, rest = inputs[SAMPLE_ID], {k: v for k, v in inputs.items() if k != SAMPLE_ID}
    if not torch.is_tensor(ids) and any(isinstance(value, str) for value in ids):
        return rest, None  # a text column of the same name
    return rest, tuple(torch.as_tensor(ids).tolist())


def forward_function(trainer: FlopsTrainerMixin, model: nn.Module) -> Forward:
    """Return a function that runs the model and computes the loss as the stock trainer does."""
    modules = {model, *(value for value in vars(trainer).values() if isinstance(value, nn.Module))}
    own = type(trainer).compute_loss is not Trainer.compute_loss

    def forward(inputs: Inputs) -> tuple[Tensor | None, object]:
        rows = batch_size(inputs)
        given = trainer.layout.restored(inputs)
        given.pop(ROW, None)
        with rows_together(modules, rows) if own and rows > 1 else nullcontext():
            return whole(given)

    def whole(inputs: dict[str, Any]) -> tuple[Tensor | None, object]:
        items = None
        if reads_items(trainer):
            # as in a stock step; a loss that divides by this number is the mean of these rows
            items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
        result = trainer.compute_loss(model, inputs, num_items_in_batch=items)
        trainer.gathered.forward_ended()
        return (result[0] if isinstance(result, tuple) else result), None

    return forward


def reads_items(trainer: Trainer) -> bool:
    """Return whether something other than the model may divide its loss by the number of labels.

    A model's own loss is the mean of its elements without that number. With it, it need not be:
    labels that PEFT's virtual tokens make room for are not counted.
    """
    own = type(trainer).compute_loss is not Trainer.compute_loss
    return own or trainer.compute_loss_func is not None or trainer.label_smoother is not None


def averaging(
    trainer: Trainer, batch: Batch, items: Tensor | int | None, *, counts_labels: bool
) -> Averaging:
    """Return how a batch weighs in its optimizer step.

    Args:
        trainer: knows the other batches of the step.
        batch: the batch.
        items: the stock trainer's count of labels in the step; None where it does not count.
        counts_labels: whether batches weigh by that count. The loss may have another number of
            elements, as it may weigh or ignore classes.
    """
    batches = float(trainer.current_gradient_accumulation_steps)
    # the count of a single batch is its own
    if items is not None and counts_labels and batches > 1:
        count = trainer._get_num_items_in_batch([batch.inputs], trainer.args.device)
        both = [torch.as_tensor(number, device=trainer.args.device) for number in (items, count)]
        of_step, own = torch.stack(both).tolist()
        batches = of_step / own if own else batches
    return Averaging(batches, last=trainer.accelerator.sync_gradients)


class ElementMean:
    """Averages over the loss elements of all batches of an optimizer step, whose number is known
    only at its end.

    Until then batches are divided by the number of the first one.

    Args:
        model: its gradients are rescaled with the last batch.
        logged: whether a trajectory log records batches, which then cannot be rescaled.
    """

    def __init__(self, model: nn.Module, *, logged: bool) -> None:
        self.model, self.logged = model, logged
        self._first = self._elements = self._loss = 0.0

    def estimate(
        self,
        session: GradientSession,
        batch: Batch,
        position: BatchPosition,
        weight: Averaging,
    ) -> StepResult:
        """Estimate a batch's gradient; losses of a step's results sum to its mean loss."""
        if self.logged:
            return self._alike(session.estimate(batch, position, weight), position)
        fresh = position.position == 0
        result = session.estimate(
            batch, position, replace(weight, batches=1.0, elements=None if fresh else self._first)
        )
        if fresh:
            self._first, self._elements, self._loss = result.elements or 1.0, 0.0, 0.0
        self._elements += result.elements
        before, self._loss = self._loss, self._loss + float(result.loss)
        if not weight.last:
            return result
        factor = self._first / (self._elements or 1.0)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        return replace(result, loss=result.loss.new_tensor(self._loss * factor - before))

    def _alike(self, result: StepResult, position: BatchPosition) -> StepResult:
        """Refuse batches with different numbers of elements."""
        if position.position > 0 and result.elements != self._first:
            raise ObjectiveError(
                f"trajectory_log=True records batches of an optimizer step with {self._first:g} "
                f"and {result.elements:g} loss elements as if they had equal numbers: use "
                "gradient_accumulation_steps=1, or switch the log off."
            )
        self._first = result.elements
        return result


class PositionCounter:
    """Tells where a batch lies in the run: the batches of one optimizer step follow each other.

    Attributes:
        samples: of the optimizer step, so far.
    """

    def __init__(self) -> None:
        self.samples, self._step = 0, -1

    def place(self, batch: Batch, seed: int, epoch: float | None) -> BatchPosition:
        """Return the position of the next batch."""
        if batch.step != self._step:
            self.samples, self._step = 0, batch.step
        position = self.samples
        self.samples += batch.samples
        return BatchPosition(
            seed=seed, step=batch.step, position=position, epoch=epoch or 0.0, ids=batch.ids
        )
