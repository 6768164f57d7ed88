"""From the inputs that the stock trainer loads to the batches of an optimizer step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..autotune.protocol import Averaging, Batch
from ..base.batch import Inputs
from ..base.rows import BatchPosition
from ..objectives import Forward

SAMPLE_ID = "sample_id"


def without_ids(inputs: Inputs) -> tuple[Inputs, tuple[int, ...] | None]:
    """Return the inputs of the model and the numbers of the samples, if there are any."""
    if not isinstance(inputs, Mapping) or SAMPLE_ID not in inputs:
        return inputs, None
    ids = tuple(torch.as_tensor(inputs[SAMPLE_ID]).tolist())
    return {name: value for name, value in inputs.items() if name != SAMPLE_ID}, ids


def forward_function(trainer: Trainer, model: nn.Module) -> Forward:
    """Return a function that runs the model and computes the loss as the stock trainer does."""

    def forward(inputs: Inputs) -> tuple[Tensor | None, object]:
        items = None
        if reads_items(trainer):
            # as in a stock step; a loss that divides by this number is the mean of these rows
            items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
        result = trainer.compute_loss(model, dict(inputs), num_items_in_batch=items)
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
    if items is not None and counts_labels:
        count = trainer._get_num_items_in_batch([batch.inputs], trainer.args.device)
        batches = float(items) / float(count) if count else batches
    return Averaging(batches, last=trainer.accelerator.sync_gradients)


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
