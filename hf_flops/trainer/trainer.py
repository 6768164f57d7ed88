"""FlopsTrainer: `transformers.Trainer` with a training step that only runs the model forward.

Wiring only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from ..allocators import ALLOCATORS, Allocator
from ..autotune.protocol import Averaging, Batch, GradientSession, HandOver
from ..base.batch import Inputs
from ..base.rows import BatchPosition
from ..contrastive import start_session
from ..contrastive.dual_encoder import with_plain_flag
from ..core.method import FinishedBatch
from ..distributed.collectives import ProcessGroup
from ..estimators import Estimator
from ..objectives import CallableObjective, Forward, Objective, RowLossError
from ..perturbations import ParameterVector, Perturbation
from ..reporting.callbacks import add_reports
from ..reporting.ledger import Ledger
from ..reporting.model_card import TAGS, complete_card
from ..trajectory.recorder import TrajectoryRecorder
from .args import FlopsTrainingArguments
from .checkpoint_state import load_state, save_state
from .checkpoints import CheckpointWriter, SaveOnSigterm, chosen_checkpoint, generator_states
from .learning_rate_search import RateSearch
from .multiprocess import BatchSize, Lockstep, start_group, undivided_loader
from .preparation import (
    check_arguments,
    check_labels,
    check_ready,
    evaluation_mode,
    quantised_base_allowed,
    shared_texts,
    widen_trainable,
    without_cache,
    wrap_with_adapter,
)
from .query_budget import QueryBudget
from .settings import as_code

logger = logging.getLogger(__name__)
SAMPLE_ID = "sample_id"
if TYPE_CHECKING:
    _Base = Trainer  # so that `self` is typed
else:
    _Base = object


class FlopsTrainerMixin(_Base):
    """Forward-only training for any class derived from `transformers.Trainer`:
    `class T(FlopsTrainerMixin, SomeTrainer)`.

    A data set column `sample_id` (whole numbers) never reaches the model; it lets the trainer count
    queries per sample, and the allocator remember what a sample's deltas were.

    Attributes:
        ledger: rows used, queries per sample, and what the last step found.
        costs: what the last run cost, or this one so far.
        session: what the run has learned about its gradient, once it has begun.

    Args:
        model: a model with trainable parameters, or a plain one together with `peft_config`.
        args: `FlopsTrainingArguments`, or any arguments class with `FlopsArgumentsMixin`.
        peft_config: a PEFT configuration to wrap the model with.
        objective: what to minimise instead of the model's own loss: a function that maps (outputs,
            inputs) of R rows to (R,) losses, a `Metric` or `GeneratedMetric` to be improved, a
            `ContrastiveLoss`, or an `Objective`; it needs no derivative.
        allocator: an instance, in place of the name in `args`.
        estimator: an instance, in place of the name in `args`.
        perturbation: an instance, in place of the name in `args`; it skips the self-check.
        kwargs: everything else that the stock trainer takes.

    Raises:
        ConfigurationError: nothing is trainable, the data set is empty, or unsuitable arguments or
            processes.
    """

    args: Any
    model: Any
    _tag_names: ClassVar = list(TAGS)
    _name = "FLOPS"
    _paper: ClassVar = {
        "title": "FLOPS: Forward Learning with OPtimal Sampling",
        "id": "2410.05966",
    }

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *positional: Any,
        peft_config: Any = None,
        objective: Objective | Callable[..., Any] | None = None,
        allocator: Allocator | None = None,
        estimator: Estimator | None = None,
        perturbation: Perturbation | None = None,
        **kwargs: Any,
    ) -> None:
        args = FlopsTrainingArguments() if args is None else args
        check_arguments(args)
        self._peft_config = peft_config
        if peft_config is not None and isinstance(model, nn.Module):
            model = wrap_with_adapter(model, peft_config)
        if objective is not None and not isinstance(objective, Objective):
            objective = CallableObjective(objective)
        self._objective: Any = objective
        self._instances: dict[str, Any] = {
            "allocator": allocator,
            "estimator": estimator,
            "perturbation": perturbation,
        }
        self._ids: list[int] | None = None
        self._rate: RateSearch | None = None
        self._group: ProcessGroup | None = None
        self._writer, self._leave = CheckpointWriter(), SaveOnSigterm()
        self._recorder = TrajectoryRecorder() if args.trajectory_log else None
        with quantised_base_allowed(model):
            super().__init__(model, args, *positional, **kwargs)
        self._begin()
        self._budget = QueryBudget(
            lambda: self.args.max_queries,
            lambda step: self.session.rows(1, step),
            lambda: self.ledger,
        )
        for callback in (self._budget, self._leave, self._recorder):
            if callback is not None:
                self.add_callback(callback)
        self.costs = add_reports(self, lambda: self.ledger)
        needs_clean = (allocator or ALLOCATORS[args.allocator]()).needs_clean
        check_ready(self.model, self.train_dataset, needs_clean, args.per_device_train_batch_size)
        widen_trainable(self.model)
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

    # A run begins.

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Build the model as the stock trainer does, and wrap it with `peft_config`."""
        model: Any = super().call_model_init(trial)
        model = model if self._peft_config is None else wrap_with_adapter(model, self._peft_config)
        widen_trainable(model)
        return model

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as the stock trainer does; each run starts with a new ledger, estimator, allocator
        and self-check.

        Raises:
            ConfigurationError: there is no whole checkpoint to resume from.
            SystemExit: SIGTERM has arrived, and the run has saved.
        """
        self._begin()
        self.remove_callback(RateSearch)
        self._rate = self._new_search() if self.args.learning_rate_search else None
        if self._rate is not None:
            self.add_callback(self._rate)
        with self._leave.listening(alone=self.args.world_size == 1), self.group.watched():
            checkpoint = chosen_checkpoint(resume_from_checkpoint, self.args.output_dir, self.group)
            return super().train(checkpoint, *args, **kwargs)

    def _begin(self) -> None:
        """Forget the last run, and do what the arguments say by now."""
        self._group = start_group(self.args, self._group)
        self._lockstep = Lockstep(self.group, self.args, self._leave)
        self.ledger = Ledger()
        self._session: GradientSession | None = None
        self._position, self._position_step = 0, -1

    def _new_search(self) -> RateSearch:
        return RateSearch()

    @property
    def group(self) -> ProcessGroup:
        """The processes of the run."""
        assert self._group is not None
        return self._group

    @property
    def session(self) -> GradientSession:
        """What the run has learned about its gradient; begun when it is first asked for."""
        if self._session is None:
            self._session = self._new_session(whole=self.compute_loss_func is not None)
        return self._session

    def _new_session(self, *, whole: bool) -> GradientSession:
        metered = lambda forward: self.ledger.metered(forward)  # noqa: E731, the ledger is a new one in each run
        given: dict[str, Any] = {
            "objective": self._objective,
            **self._instances,
            "check": self._check_labels,
        }
        return start_session(self.args, self.model, self.group, metered, whole=whole, **given)

    def _check_labels(self, batch: Batch) -> None:
        if not self.can_return_loss:
            check_labels(batch.forward, batch.inputs, self.label_names)

    def _hp_search_setup(self, trial: Any) -> None:
        """Take up a trial's arguments as the stock trainer does, which is after `train` has
        begun.
        """
        super()._hp_search_setup(trial)
        if trial is not None:
            self._begin()

    # A training step.

    def training_step(
        self,
        model: nn.Module,
        inputs: Inputs,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Estimate the gradient from perturbed forwards and add it to `.grad`, in place of loss and
        backward.

        Where the model's own loss can no longer be taken per row, it is the batch's from here on,
        which is then done anew.

        Returns:
            The batch's share of the optimizer step's mean loss, a detached scalar.

        Raises:
            ObjectiveError: the loss cannot be had, or not the way that was asked for.
            NonFiniteError: not one perturbed row has a finite loss.
        """
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()
        inputs = without_cache(self.model, with_plain_flag(self._prepare_inputs(inputs)))
        self._lockstep.check(model, inputs, self.state.global_step)
        batch = self._batch(model, inputs)
        position = self._place(batch)
        try:
            return self._estimated(model, batch, position, num_items_in_batch)
        except RowLossError as error:
            self.session.fall_back(
                error, recorded=self._recorder is not None and self._recorder.begun
            )
        except HandOver:
            self._session = self._new_session(whole=True)
        return self._estimated(model, batch, position, num_items_in_batch)

    def _estimated(
        self, model: nn.Module, batch: Batch, position: BatchPosition, items: Tensor | int | None
    ) -> Tensor:
        """Prepare, search the rate, ask the budget, estimate, tell the observers."""
        with self._inference(model, batch):
            self.session.prepare(batch)
            self.ledger.rows, self.session.check_rows = (
                self.ledger.rows + self.session.check_rows,
                0,
            )
            self._search_rate(batch)
            if not self._budget.allows(batch.samples, batch.step):
                return self._refuse_step(model)
            averaging, before = (
                self._averaging(batch, items),
                (self.ledger.all_rows, self.ledger.tokens),
            )
            result = self.session.estimate(batch, position, averaging)
            self.ledger.reconcile(before, result.rows, self.group)
        finished = FinishedBatch(result, batch.inputs, position, self.session.method)
        for observer in self._observers():
            observer.observe(finished)
        return result.loss.to(self.args.device)

    def _observers(self) -> Sequence[Any]:
        """Return what learns from finished batches."""
        recorder = [] if self._recorder is None else [self._recorder]
        return [self.ledger, *recorder, *self.session.observers]

    @contextmanager
    def _inference(self, model: nn.Module, batch: Batch) -> Iterator[None]:
        """Run only forward passes inside: evaluation mode, no gradients, the stock precision."""
        clean, context = self.session.needs_clean, self.compute_loss_context_manager()
        shared = shared_texts(self.model, batch.inputs, clean)
        with evaluation_mode(model), torch.no_grad(), context, shared:
            yield

    def _refuse_step(self, model: nn.Module) -> Tensor:
        """Take nothing of an optimizer step that the budget does not allow, not even in part."""
        model.zero_grad()
        self.session.discard()
        if self._recorder is not None:
            self._recorder.discard()
        return torch.zeros((), device=self.args.device)

    def _search_rate(self, batch: Batch) -> None:
        """Search the learning rate, if that is wanted and due; every row is charged."""
        if self._rate is None:
            return
        planned = self.session.rows(
            batch.samples * self.args.gradient_accumulation_steps, batch.step
        )
        vector, before = ParameterVector.of(self.model), (self.ledger.all_rows, self.ledger.tokens)
        rows = self._rate.step(
            self.session,
            batch,
            vector,
            self.optimizer,
            self.group,
            planned=planned,
            left=self._budget.left,
        )
        if rows:
            self.ledger.rows += rows
            self.ledger.reconcile(before, rows, self.group)

    # What a step needs to know of the run.

    def _batch(self, model: nn.Module, inputs: Inputs) -> Batch:
        """Return a batch with what runs the model on it."""
        step, ids = self.state.global_step, None if self._ids is None else tuple(self._ids)
        forward = self.ledger.metered(self._forward_function(model))
        generates = self._objective is not None and self._objective.generates
        checks = (
            self.ledger.metered(partial(self._objective.surrogate.run, model))
            if generates
            else None
        )
        return Batch(inputs, forward, step, step / max(self.state.max_steps, 1), ids, checks)

    def _forward_function(self, model: nn.Module) -> Forward:
        """Return what runs the model; labels are not needed where the objective is the user's
        own.
        """
        if self._objective is not None:
            return partial(self._objective.run, model)

        def forward(inputs: Inputs) -> tuple[Tensor | None, Any]:
            # A user's function may divide by the count, so it gets that of these rows: the loss is
            # their mean.
            own = self.compute_loss_func is not None
            items = (
                {"num_items_in_batch": self._get_num_items_in_batch([inputs], self.args.device)}
                if own
                else {}
            )
            found = self.compute_loss(model, dict(inputs), return_outputs=True, **items)
            # an override may return nothing but the loss
            return found if isinstance(found, tuple) else (found, None)

        return forward

    def _place(self, batch: Batch) -> BatchPosition:
        """Return where the batch lies in the run: micro-batches of one optimizer step follow each
        other.
        """
        if batch.step != self._position_step:
            self._position, self._position_step = 0, batch.step
        position = self._position
        self._position += batch.samples
        return BatchPosition(
            seed=self._seed,
            step=batch.step,
            position=position,
            epoch=self.state.epoch or 0.0,
            ids=batch.ids,
        )

    @property
    def _seed(self) -> int:
        return self.args.seed if self.args.noise_seed is None else self.args.noise_seed

    def _averaging(self, batch: Batch, num_items_in_batch: Tensor | int | None) -> Averaging:
        """Return over how many batches like this one the optimizer step averages, by the stock
        trainer's count of labels.

        The loss may have another number of elements, as it may weigh or ignore classes. Where
        nothing is counted, batches weigh alike.
        """
        batches = float(self.current_gradient_accumulation_steps)
        if num_items_in_batch is not None and self.session.counts_labels:
            items = self._get_num_items_in_batch([batch.inputs], self.args.device)
            batches = float(num_items_in_batch) / float(items) if items else batches
        return Averaging(batches, last=self.accelerator.sync_gradients)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Prepare inputs as the stock trainer does, after taking the samples' ids out."""
        self._ids = None
        if isinstance(inputs, Mapping) and SAMPLE_ID in inputs:
            self._ids = torch.as_tensor(inputs[SAMPLE_ID]).tolist()
            inputs = {name: value for name, value in inputs.items() if name != SAMPLE_ID}
        return super()._prepare_inputs(inputs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if SAMPLE_ID not in columns:
            columns.append(SAMPLE_ID)

    # Logs, cards, checkpoints, processes.

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add rows used and the averages of the estimator's metrics to the training log, and the
        rate that is searched.
        """
        if "loss" in logs:
            sent = {"sent_bytes": self.group.sent} if self.group.world > 1 else {}
            logs = {**logs, **self.session.log(), **self.ledger.summary(), **sent}
        if self._rate is not None and "learning_rate" in logs:
            factor = self._rate.multiplier
            logs = {
                **logs,
                "learning_rate": logs["learning_rate"] * factor,
                "learning_rate_multiplier": factor,
            }
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: Inputs) -> int:
        """Count 2 operations per parameter, token and row: the third of the stock count, times the
        queries.
        """
        flos = (
            super().floating_point_ops(dict(inputs))
            // 3
            * self.session.rows(1, self.state.global_step)
        )
        return flos // self.args.world_size

    def create_model_card(self, *positional: Any, **options: Any) -> None:
        """Write the stock card, with our tags beside those of the model, the adapter and the
        caller, and our sections.
        """
        super().create_model_card(*positional, **options)
        if self.is_world_process_zero():
            settings, costs = as_code(self.args), self.costs.so_far()
            complete_card(self.args.output_dir, settings, self.model, costs, options.get("tags"))

    def _parts(self) -> dict[str, Any]:
        """Return what has a state, by name."""
        rate = {} if self._rate is None else {"learning rate search": self._rate}
        batch = BatchSize(self.get_total_train_batch_size(self.args))
        return {"ledger": self.ledger, "batch": batch, **self.session.parts(), **rate}

    def save_state(self) -> None:
        """Save the trainer's state as the stock trainer does, and that of our parts beside it."""
        super().save_state()
        if self.args.should_save:
            save_state(self.args.output_dir, self._parts())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_state(output_dir, self._parts())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        load_state(checkpoint, self._parts())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with generator_states(checkpoint, self.args) as folder:
            super()._load_rng_state(folder)

    def _get_output_dir(self, trial: Any) -> str:
        return self._writer.folder(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as the stock trainer does, so that the checkpoint appears whole or not at all."""
        run = Path(self._get_output_dir(trial))
        with self._writer.whole(run, self.args, self.state, self.group) as folder:
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run), self.args.save_total_limit, best, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._writer.saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _wrap_model(
        self, model: nn.Module, training: bool = True, dataloader: Any = None
    ) -> nn.Module:
        """Leave the model as it is: there is no backward pass for DistributedDataParallel to wait
        for.
        """
        if training and model is self.model and self.args.world_size > 1:
            return self.accelerator.prepare_model(model, evaluation_mode=True)
        return super()._wrap_model(model, training, dataloader)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Build the stock trainer's data loader; the one for training reads the batches of all
        processes.
        """
        return undivided_loader(self, super()._get_dataloader, args, kwargs)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Count the tokens that all processes have read alike once."""
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = (
            before + (self.state.num_input_tokens_seen - before) // self.args.world_size
        )


class FlopsTrainer(FlopsTrainerMixin, Trainer):
    """`transformers.Trainer` that trains with forward passes only; see `FlopsTrainerMixin` for what
    it adds.

    References:
        Ren et al. (2025), FLOPS: Forward Learning with OPtimal Sampling, arXiv 2410.05966.
    """
