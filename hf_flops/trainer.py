"""FlopsTrainer: `transformers.Trainer` with a training step that only runs the model forward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer

from .allocators import ALLOCATORS, Allocator
from .args import FlopsTrainingArguments
from .budget import QueryBudget
from .cards import TAGS, ModelCards
from .checkpoints import Leave, WholeCheckpoints
from .checks import (
    check_arguments,
    check_ready,
    evaluation_mode,
    held_back,
    quantised_base_allowed,
    shared_texts,
    widen_trainable,
    without_cache,
    wrap_with_adapter,
)
from .control_variates import control_variate
from .errors import ObjectiveError
from .estimators import ESTIMATORS, Estimator
from .heads import ClosedFormHead
from .image_text import with_plain_flag
from .learning_rate import SearchesRate
from .ledger import Ledger, class_labels
from .method import Method
from .objectives import CallableObjective, Objective, RowLossError
from .pair_steps import PairSteps
from .perturbations import Perturbation
from .processes import ManyProcesses
from .reuse import Reuse
from .rows import Place, batch_size
from .selfcheck import precision_of
from .setup import loss_of_batch, set_up
from .state import load_state, save_state
from .step import estimate_gradient
from .trajectory.recorder import TrajectoryRecorder
from .tuning import Tuning
from .watching import Watched

logger = logging.getLogger(__name__)
SAMPLE_ID = "sample_id"


class FlopsTrainerMixin(ModelCards, Watched, SearchesRate, WholeCheckpoints, ManyProcesses):
    """Forward-only training for any class derived from `transformers.Trainer`: `class T(FlopsTrainerMixin, SomeTrainer)`.

    A data set column `sample_id` (whole numbers) never reaches the model; it lets the trainer count queries per sample, and
    the allocator remember what a sample's deltas were.

    Attributes:
        ledger: rows used, queries per sample, and what the last step found.
        costs: what the last run cost, or this one so far.

    Args:
        model: a model with trainable parameters, or a plain one together with `peft_config`.
        args: `FlopsTrainingArguments`, or any arguments class with `FlopsArgumentsMixin`.
        peft_config: a PEFT configuration to wrap the model with.
        objective: what to minimise instead of the model's own loss: a function that maps (outputs, inputs) of R rows to
            (R,) losses, a `Metric` or `GeneratedMetric` to be improved, a `ContrastiveLoss`, or an `Objective`; it needs no
            derivative.
        allocator: an instance, in place of the name in `args`.
        estimator: an instance, in place of the name in `args`.
        perturbation: an instance, in place of the name in `args`; it skips the self-check.
        kwargs: everything else that the stock trainer takes.

    Raises:
        ConfigurationError: nothing is trainable, the data set is empty, or unsuitable arguments or processes.
    """

    _tag_names: ClassVar = list(TAGS)
    _name = "FLOPS"
    _paper: ClassVar = {"title": "FLOPS: Forward Learning with OPtimal Sampling", "id": "2410.05966"}

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
        self._own_objective = objective is not None
        self._pairs = PairSteps(objective)
        self._given_allocator = allocator
        self._allocator: Allocator = allocator or ALLOCATORS[args.allocator]()
        self._given_estimator = estimator
        self._estimator: Estimator = estimator or ESTIMATORS[args.estimator]()
        self._perturbation = self._given_perturbation = perturbation
        self._held: frozenset[str] = frozenset()
        self._trained: list[bool] = []
        self._reuse: Reuse | None = None
        self._head: ClosedFormHead | None = None
        self._control = control_variate(args.control_variate)
        self._tuning = Tuning.of(args, self._objective)
        self._position, self._position_step = 0, -1
        self._ids: list[int] | None = None
        self.ledger = Ledger()
        with quantised_base_allowed(model):
            super().__init__(model, args, *positional, **kwargs)  # type: ignore[call-arg]
        self._budget = QueryBudget(lambda: self.args.max_queries, self._queries_at, lambda: self.ledger)  # type: ignore[attr-defined]
        self.add_callback(self._budget)  # type: ignore[attr-defined]
        self._leave = Leave()
        self.add_callback(self._leave)  # type: ignore[attr-defined]
        self._recorder = TrajectoryRecorder() if args.trajectory_log else None
        if self._recorder is not None:
            self.add_callback(self._recorder)  # type: ignore[attr-defined]
        self._start_sharing()
        self._watch()
        self._announce()

    def _announce(self: Any) -> None:
        """Check that there is something to train, and tag the model for the Hub."""
        batch = self.args.per_device_train_batch_size
        check_ready(self.model, self.train_dataset, self._allocator.needs_clean, batch)
        widen_trainable(self.model)
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Build the model as the stock trainer does, and wrap it with `peft_config`."""
        model = super().call_model_init(trial)  # type: ignore[misc]
        model = model if self._peft_config is None else wrap_with_adapter(model, self._peft_config)
        widen_trainable(model)
        return model

    def train(self: Any, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the stock trainer does; each run starts with a new ledger, estimator, allocator and self-check.

        Raises:
            ConfigurationError: there is no whole checkpoint to resume from.
            SystemExit: SIGTERM has arrived, and the run has saved.
        """
        self._begin()
        self._start_sharing()
        with self._leave.listening(alone=self.args.world_size == 1), self._share.watched():
            return super().train(self._chosen_checkpoint(resume_from_checkpoint), *args, **kwargs)

    def _begin(self: Any) -> None:
        """Forget the last run, and do what the arguments say by now."""
        self._perturbation, self._reuse, self._position_step = self._given_perturbation, None, -1
        self._allocator = self._given_allocator or ALLOCATORS[self.args.allocator]()
        self._estimator = self._given_estimator or ESTIMATORS[self.args.estimator]()
        self.ledger, self._tuning = Ledger(), Tuning.of(self.args, self._objective)
        self._control = control_variate(self.args.control_variate)
        self._pairs.reset()
        if not self._own_objective:
            self._objective = None

    def _hp_search_setup(self: Any, trial: Any) -> None:
        """Take up a trial's arguments as the stock trainer does, which is after `train` has begun."""
        super()._hp_search_setup(trial)  # type: ignore[misc]
        if trial is not None:
            self._begin()

    def training_step(
        self: Any, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Estimate the gradient from perturbed forwards and add it to `.grad`, in place of loss and backward.

        Where the model's own loss can no longer be taken per row, it is the batch's from here on, which is then done anew.

        Returns:
            The batch's share of the optimizer step's mean loss, a detached scalar.

        Raises:
            ObjectiveError: the loss cannot be had, or not the way that was asked for.
            NonFiniteError: not one perturbed row has a finite loss.
        """
        try:
            return self._estimated(model, inputs, num_items_in_batch)
        except RowLossError as error:
            self._take_whole_batches(error)
        return self._estimated(model, inputs, num_items_in_batch)

    def _take_whole_batches(self: Any, error: RowLossError) -> None:
        """Go on with the loss of the batch as a whole and shared noise, if nothing is in the way of a change."""
        if self._own_objective:
            raise error
        many = self._share.world > 1
        if many or (self._recorder is not None and self._recorder.begun):
            where = f"a run of {self._share.world} processes" if many else "an optimizer step that trajectory_log records"
            raise ObjectiveError(
                f"In the middle of {where} the loss cannot become that of whole batches, but {error}: resume from the last "
                "checkpoint, or pass objective=."
            )
        self._objective, self._perturbation, self._reuse = loss_of_batch(self.args, error), self._given_perturbation, None

    def _estimated(self: Any, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> Tensor:
        """Do what `training_step` says, or leave gradients as they are where that raises an error."""
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        inputs = without_cache(self.model, with_plain_flag(self._prepare_inputs(inputs)))
        self._meet(model, inputs)
        context, clean = self.compute_loss_context_manager(), self._estimator.baseline or self._allocator.needs_clean
        with evaluation_mode(model), torch.no_grad(), context, shared_texts(self.model, inputs, clean):
            forward = self.ledger.metered(self._forward_function(model))
            self._hold_back()
            alignment = self._pairs.ready(self, forward, inputs)
            method: Any = None if alignment is not None else self._complete_method(model, forward, inputs)
            self._search_rate(forward, inputs, method)
            if not self._budget.allows(batch_size(inputs), self.state.global_step):
                return self._refuse_step(model)
            place, batches = self._place(inputs), self.current_gradient_accumulation_steps
            if alignment is not None:
                result, method = alignment.step(inputs, place, self._queries_at(self.state.global_step), batches)
            else:
                batches = self._batches(inputs, num_items_in_batch)
                last, before = self.accelerator.sync_gradients, (self.ledger.all_rows, self.ledger.tokens)
                result = estimate_gradient(forward, inputs, method, place, None, batches, last=last)
                self._count_together(before, result.rows)
        self.ledger.record(result, self._ids, class_labels(inputs))
        if self._recorder is not None:
            self._recorder.batch(result.trace, place.seed, method.perturbation)
        if method is not None:
            self._tuning.learn(result, method)
        return result.loss.to(self.args.device)

    def _refuse_step(self: Any, model: nn.Module) -> Tensor:
        """Take nothing of an optimizer step that the budget does not allow, not even in part."""
        model.zero_grad()
        self._exchange.forget()
        if self._recorder is not None:
            self._recorder.discard()
        return torch.zeros((), device=self.args.device)

    def _complete_method(self: Any, model: nn.Module, forward: Any, inputs: dict[str, Any]) -> Method:
        """Return the method of a step, with what was found out so far or is now."""
        new = self._objective is None or self._perturbation is None or self._reuse is None
        if new:
            self._set_up(model, forward, inputs)
        precision = precision_of(self.model, autocast=self.args.bf16)
        method = self._tuning.complete(self._method(precision), forward, inputs, precision=precision, seed=self._seed())
        method = self._agreed(method) if new else method
        self.ledger.rows, self._tuning.rows = self.ledger.rows + self._tuning.rows, 0
        return method

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Prepare inputs as the stock trainer does, after taking the samples' ids out."""
        if isinstance(inputs, Mapping) and SAMPLE_ID in inputs:
            ids = inputs[SAMPLE_ID]
            inputs = {name: value for name, value in inputs.items() if name != SAMPLE_ID}
            self._ids = torch.as_tensor(ids).tolist()
        else:
            self._ids = None
        return super()._prepare_inputs(inputs)  # type: ignore[misc]

    def _set_signature_columns_if_needed(self: Any) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if SAMPLE_ID not in self._signature_columns:
            self._signature_columns.append(SAMPLE_ID)

    def _forward_function(self: Any, model: nn.Module) -> Callable[[Mapping[str, Any]], tuple[Tensor | None, Any]]:
        """Return what runs the model; labels are not needed where the objective is the user's own."""
        if self._own_objective:
            return partial(self._objective.run, model)

        def forward(inputs: Mapping[str, Any]) -> tuple[Tensor | None, Any]:
            # A user's function may divide by the count, so it gets that of these rows: the loss is their mean.
            own = self.compute_loss_func is not None
            items = {"num_items_in_batch": self._get_num_items_in_batch([inputs], self.args.device)} if own else {}
            found = self.compute_loss(model, dict(inputs), return_outputs=True, **items)
            return found if isinstance(found, tuple) else (found, None)  # an override may return nothing but the loss

        return forward

    def _hold_back(self: Any) -> None:
        """Start anew with the self-check where other tensors than before are to be trained."""
        held = held_back(self.model, self.args.lora_parts, self.state.global_step / max(self.state.max_steps, 1))
        groups = getattr(self.optimizer, "param_groups", ())  # a callback may freeze some of these
        trained = [parameter.requires_grad for group in groups for parameter in group["params"]]
        if (held, trained) != (self._held, self._trained):
            self._held, self._trained, self._perturbation, self._reuse = held, trained, self._given_perturbation, None
            self._pairs.renew()

    def _set_up(self: Any, model: nn.Module, forward: Any, inputs: dict[str, Any]) -> None:
        """Choose objective and perturbation with the first batch, and say what was not as hoped."""
        named = [name for name in self.label_names if name in inputs]
        pairs = self._pairs.whole(self, inputs)
        self._objective = self._objective if pairs is None else pairs
        unlabelled = pairs is None and not self._own_objective and not self.can_return_loss and not named
        if unlabelled and not _gives_loss(forward, inputs):
            raise ObjectiveError(
                f"The batch has no labels: its keys are {sorted(inputs)}, and none of {self.label_names} is among them."
            )
        if self._objective is not None and self._objective.generates:
            forward = self.ledger.metered(partial(self._objective.surrogate.run, model))
        chosen = set_up(self.args, self.model, forward, inputs, self._objective, self._perturbation, self._held)
        self._objective, self._perturbation, self._reuse, self._head = chosen

    def _method(self: Any, precision: float) -> Method:
        """Put the method together, as far as the arguments fix it."""
        scale = self.args.perturbation_scale
        return Method(
            objective=self._objective,
            perturbation=self._perturbation,
            estimator=self._estimator,
            allocator=self._allocator,
            queries_per_sample=self._queries_at(self.state.global_step),
            scale=scale if isinstance(scale, (int, float)) else 1e-3 if precision < 1e-3 else 1e-2,
            rows_per_forward=1,
            reuse=self._reuse,
            head=self._head,
            control=self._control if self._objective.predictable else None,
            exchange=self._exchange,
        )

    def _place(self: Any, inputs: dict[str, Any]) -> Place:
        """Return where the batch lies in the run: micro-batches of one optimizer step follow each other."""
        step = self.state.global_step
        if step != self._position_step:
            self._position, self._position_step = 0, step
        position = self._position
        self._position += batch_size(inputs)
        ids = None if self._ids is None else tuple(self._ids)
        return Place(seed=self._seed(), step=step, position=position, epoch=self.state.epoch or 0.0, ids=ids)

    def _seed(self: Any) -> int:
        return self.args.seed if self.args.noise_seed is None else self.args.noise_seed

    def _batches(self: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> float:
        """Return over how many batches like this one the optimizer step averages, by the stock trainer's count of labels.

        The loss may have another number of elements, as it may weigh or ignore classes. Where nothing is counted, batches
        weigh alike.
        """
        batches = self.current_gradient_accumulation_steps
        if num_items_in_batch is None or self._own_objective or not self._objective.per_row:
            return batches
        items = self._get_num_items_in_batch([inputs], self.args.device)
        return float(num_items_in_batch) / float(items) if items else batches

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add rows used and the averages of the estimator's metrics to the training log."""
        if "loss" in logs:
            logs = {**logs, **self._tuning.found, **self.ledger.summary(), **self._traffic()}
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self: Any, inputs: dict[str, Any]) -> int:
        """Count 2 operations per parameter, token and row: the third of the stock count, times the queries."""
        flos = super().floating_point_ops(inputs) // 3 * self._queries_at(self.state.global_step)  # type: ignore[misc]
        return flos // self.args.world_size

    def _queries_at(self: Any, step: int) -> int:
        """Return the rows per sample of an optimizer step, for which all before are done."""
        queries = self._tuning.queries
        return self.args.queries_per_sample if queries is None else queries.at(step)

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_state(output_dir, *self._parts())

    def save_state(self: Any) -> None:
        """Save the trainer's state as the stock trainer does, and the method's beside it."""
        super().save_state()  # type: ignore[misc]
        if self.args.should_save:
            save_state(self.args.output_dir, *self._parts())

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        load_state(checkpoint, *self._parts())

    def _parts(self: Any) -> tuple[dict[str, Any], Any]:
        """Return what has a state: parts by name, and the control variate."""
        parts = {"allocator": self._allocator, "ledger": self.ledger, "tuning": self._tuning, "batch": self._batch()}
        alignment = self._pairs.alignment(self)
        return (parts, self._control) if alignment is None else ({**parts, "alignment": alignment}, alignment.controls)


def _gives_loss(forward: Callable[[Mapping[str, Any]], tuple[Tensor | None, Any]], inputs: Mapping[str, Any]) -> bool:
    """Say whether a model makes its loss without labels, as an autoencoder does."""
    try:
        return forward(inputs)[0] is not None
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


class FlopsTrainer(FlopsTrainerMixin, Trainer):
    """`transformers.Trainer` that trains with forward passes only; see `FlopsTrainerMixin` for what it adds.

    References:
        Ren et al. (2025), FLOPS: Forward Learning with OPtimal Sampling, arXiv 2410.05966.
    """
