"""The training step: one batch, from its inputs to the estimate of its gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..autotune.first_batch import held_back
from ..autotune.protocol import Batch, GradientSession, Observer
from ..base.batch import Inputs
from ..base.rows import BatchPosition
from ..base.transfer import onto
from ..core.method import FinishedBatch
from ..objectives import Objective
from ..perturbations import ParameterVector
from .batches import averaging, forward_function
from .preparation import evaluation_mode, shared_texts

if TYPE_CHECKING:
    from .trainer import FlopsTrainerMixin


class AfterStep(TrainerCallback):
    """Tells the session that an optimizer step is done.

    Args:
        session: returns the session of the run.
    """

    def __init__(self, session: Callable[[], GradientSession]) -> None:
        self.session = session

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Finish the step."""
        self.session().finish_step(state.epoch or 0.0)


def batch_of(trainer: FlopsTrainerMixin, model: nn.Module, inputs: Inputs) -> Batch:
    """Return the batch that the trainer prepared last, with the function that runs the model."""
    step, objective, checks = trainer.state.global_step, trainer.objective, None
    loss = None
    if objective is None:
        forward = loss = forward_function(trainer, model)
    else:
        forward = partial(_run, trainer, objective, model)
        if objective.generates:
            checks = trainer.ledger.metered(partial(_run, trainer, objective.surrogate, model))
    progress = step / max(trainer.state.max_steps, 1)
    return Batch(
        inputs,
        trainer.ledger.metered(forward),
        step,
        progress,
        trainer.sample_ids,
        checks,
        trainer.state.max_steps,
        loss,
    )


def _run(
    trainer: FlopsTrainerMixin, objective: Objective, model: nn.Module, inputs: Inputs
) -> tuple[Tensor | None, object]:
    """Run the model for an objective of the user's."""
    return objective.run(model, trainer.layout.restored(inputs))


def estimate_batch(
    trainer: FlopsTrainerMixin,
    model: nn.Module,
    batch: Batch,
    position: BatchPosition,
    items: Tensor | int | None,
) -> Tensor:
    """Prepare, search the rate, ask the budget, estimate, tell the observers.

    Args:
        trainer: of the run.
        model: the model.
        batch: the batch.
        position: where it lies in the run.
        items: the stock trainer's count of labels in the optimizer step.

    Returns:
        The batch's share of the optimizer step's mean loss.
    """
    with trainer.gathered.of_one_forward():
        return _estimate(trainer, model, batch, position, items)


def _estimate(
    trainer: FlopsTrainerMixin,
    model: nn.Module,
    batch: Batch,
    position: BatchPosition,
    items: Tensor | int | None,
) -> Tensor:
    session, ledger = trainer.session, trainer.ledger
    texts = shared_texts(trainer.model, batch.inputs, session.needs_clean)
    autocast = trainer.compute_loss_context_manager()
    with evaluation_mode(model), torch.no_grad(), autocast, texts:
        before = ledger.all_rows, ledger.tokens
        session.prepare(batch)
        ledger.charge_checks(before, _checked(trainer, batch))
        ledger.rows += session.check_rows
        session.check_rows = 0
        _search_rate(trainer, batch)
        if not trainer.query_budget.allows(batch.samples, batch.step):
            return _refuse_step(trainer, model)
        weight = averaging(trainer, batch, items, counts_labels=session.counts_labels)
        before = ledger.all_rows, ledger.tokens
        trainer.gathered.begin()
        if session.counts_elements and trainer.current_gradient_accumulation_steps > 1:
            result = trainer.element_mean.estimate(session, batch, position, weight)
        else:
            result = session.estimate(batch, position, weight)
        ledger.reconcile(before, result.rows, trainer.group)
    finished = FinishedBatch(result, batch.inputs, position, session.method)
    observers: list[Observer | None] = [ledger, trainer.recorder, *session.observers]
    for observer in observers:
        if observer is not None:
            observer.observe(finished)
    return onto(result.loss, trainer.args.device)


def _checked(trainer: FlopsTrainerMixin, batch: Batch) -> Callable[[], str]:
    """Return what tells for which tensors a batch was checked."""

    def tensors() -> str:
        frozen = held_back(trainer.model, trainer.args.lora_parts, batch.progress)
        names = ParameterVector.of(trainer.model).names
        return sha256(repr((sorted(frozen), names)).encode()).hexdigest()

    return tensors


def _refuse_step(trainer: FlopsTrainerMixin, model: nn.Module) -> Tensor:
    """Drop all batches of an optimizer step that the budget does not allow."""
    model.zero_grad()
    trainer.session.discard()
    if trainer.recorder is not None:
        trainer.recorder.discard()
    return torch.zeros((), device=trainer.args.device)


def _search_rate(trainer: FlopsTrainerMixin, batch: Batch) -> None:
    """Search the learning rate, if that is due, and charge every row."""
    search, ledger = trainer.rate_search, trainer.ledger
    if search is None:
        return
    assert trainer.optimizer is not None
    samples = batch.samples * trainer.args.gradient_accumulation_steps
    before = ledger.all_rows, ledger.tokens
    rows = search.step(
        trainer.session,
        batch,
        ParameterVector.of(trainer.model),
        trainer.optimizer,
        trainer.group,
        planned=trainer.session.rows(samples, batch.step),
        left=trainer.query_budget.left,
    )
    if rows:
        ledger.rows += rows
        ledger.reconcile(before, rows, trainer.group)
