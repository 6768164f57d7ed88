"""`FlopsTrainer`, wiring only: methods override the stock trainer's, or serve those that do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from ..allocators import ALLOCATORS, Allocator
from ..autotune.protocol import Batch, GradientSession, HandOver, Stateful, seed_of
from ..base.batch import Inputs
from ..contrastive import start_session
from ..contrastive.dual_encoder import with_plain_flag
from ..distributed.even_forwards import EvenForwards
from ..estimators import Estimator
from ..objectives import Objective, RowLossError, as_objective
from ..perturbations import Perturbation
from ..reporting.callbacks import add_reports
from ..reporting.ledger import Ledger
from ..reporting.model_card import TAGS
from ..trajectory.recorder import TrajectoryRecorder
from .args import FlopsTrainingArguments
from .batches import ElementMean, PositionCounter
from .checkpoints import CheckpointWriter, chosen_checkpoint
from .gathered import GatheredMetrics
from .layout import Layout
from .learning_rate_search import RateSearch
from .multiprocess import Lockstep, start_group
from .noise_guard import NoiseGuard
from .parts import LoraParts, StreamPosition, parts_of
from .preparation import (
    add_tags,
    check_arguments,
    check_labels,
    check_ready,
    follow_accelerator,
    hold_trainable,
    positional_arguments,
    uncompiled,
    widen_trainable,
    without_autocast,
    without_cache,
    wrap_with_adapter,
)
from .quantised import quantised_base_allowed
from .query_budget import QueryBudget
from .run_lock import undisturbed
from .samples import rows_blamed
from .sigterm import SaveOnSigterm
from .step import AfterStep, batch_of, estimate_batch
from .stock import StockOverrides

if TYPE_CHECKING:
    from peft import PeftConfig


class FlopsTrainerMixin(StockOverrides):
    """Forward-only training for any class derived from `transformers.Trainer`:
    `class T(FlopsTrainerMixin, SomeTrainer)`.

    A data set column `sample_id` (whole numbers) never reaches the model; it lets the trainer count
    queries per sample, and the allocator remember the deltas of a sample.

    Attributes:
        ledger: rows used, queries per sample, and the result of the last step.
        costs: of the last run, or of this one so far.
        session: what the run has learned about its gradient, once it has begun.
        query_budget: the rows that are left.
        rate_search: the search for a learning rate, in a run that has one.
        noise_guard: halves the learning rate where noise undoes what the signal achieves.
        objective: what is minimised; None for the model's own loss.

    Args:
        model: a model with trainable parameters, or a plain one together with `peft_config`.
        positional: further arguments in the order of the stock trainer, mostly `args`.
        args: `FlopsTrainingArguments`, or any arguments class with `FlopsArgumentsMixin`.
        peft_config: a PEFT configuration to wrap the model with.
        objective: minimised in place of the model's own loss, without derivatives: a function that
            maps (outputs, inputs) of R rows to (R,) losses, a `Metric`, a `GeneratedMetric`,
            "accuracy", "macro_f1", a `ContrastiveLoss`, or an `Objective`.
        allocator: an instance, in place of the name in `args`.
        estimator: an instance, in place of the name in `args`.
        perturbation: an instance, in place of the name in `args`; it skips the self-check.
        kwargs: everything else that the stock trainer takes.

    Raises:
        ConfigurationError: nothing is trainable, the data set is empty, or unsuitable arguments or
            processes.

    Examples:
        >>> from transformers import Seq2SeqTrainer
        >>> class FlopsSeq2SeqTrainer(FlopsTrainerMixin, Seq2SeqTrainer):
        ...     pass
    """

    model: nn.Module
    _tag_names: ClassVar = list(TAGS)
    _name = "FLOPS"
    _paper: ClassVar = {
        "title": "FLOPS: Forward Learning with OPtimal Sampling",
        "id": "2410.05966",
    }

    def __init__(
        self,
        model: nn.Module | None = None,
        *positional: Any,
        args: TrainingArguments | None = None,
        peft_config: PeftConfig | None = None,
        objective: Objective | Callable[..., Tensor] | str | None = None,
        allocator: Allocator | None = None,
        estimator: Estimator | None = None,
        perturbation: Perturbation | None = None,
        **kwargs: Any,
    ) -> None:
        given = positional_arguments(positional)
        if given is None:
            kwargs["args"] = given = FlopsTrainingArguments() if args is None else args
        checked = check_arguments(given)
        model = uncompiled(model)
        without_autocast(model)
        self._peft_config = peft_config
        if peft_config is not None and isinstance(model, nn.Module):
            model = wrap_with_adapter(model, peft_config)
        if isinstance(model, nn.Module):
            hold_trainable(model)
        self.objective: Objective | None = as_objective(objective)
        self._start_session = partial(
            start_session, allocator=allocator, estimator=estimator, perturbation=perturbation
        )
        self.rate_search: RateSearch | None = None
        self.checkpoint_writer, self._sigterm = CheckpointWriter(), SaveOnSigterm()
        self.recorder = TrajectoryRecorder() if checked.trajectory_log else None
        with quantised_base_allowed(model):
            super().__init__(model, *positional, **kwargs)
        follow_accelerator(self.accelerator, self.args)
        self.lora_parts = LoraParts(self)
        self._begin()
        self.noise_guard, self.stream = NoiseGuard(lambda: self.session), StreamPosition()
        self.query_budget = QueryBudget(
            lambda: self.args.max_queries,
            lambda step: self.session.rows(1, step),
            lambda: self.ledger,
            lambda: self.get_total_train_batch_size(self.args),
        )
        after = AfterStep(lambda: self.session)
        for callback in filter(None, (after, self.query_budget, self._sigterm, self.recorder)):
            self.add_callback(callback)
        self.costs = add_reports(self, lambda: self.ledger)
        clean = (allocator or ALLOCATORS[str(checked.allocator)]()).needs_clean
        check_ready(self.model, self.train_dataset, clean, checked.per_device_train_batch_size)
        widen_trainable(self.model)
        add_tags(self.model, self._tag_names)

    def call_model_init(self, trial: object = None) -> nn.Module:
        """Build the model as the stock trainer does, and wrap it with `peft_config`."""
        model: nn.Module = super().call_model_init(trial)
        model = model if self._peft_config is None else wrap_with_adapter(model, self._peft_config)
        hold_trainable(model)
        widen_trainable(model)
        return model

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train as the stock trainer does; each run starts with a new ledger, estimator, allocator
        and self-check.

        Raises:
            ConfigurationError: no whole checkpoint to resume from, or another run in the folder.
            SystemExit: SIGTERM has arrived, and the run has saved.
        """
        self._begin()
        for kind in (RateSearch, NoiseGuard, StreamPosition):
            self.remove_callback(kind)
        self.noise_guard, self.stream = NoiseGuard(lambda: self.session), StreamPosition()
        self.add_callback(self.noise_guard)
        self.add_callback(self.stream)
        self.rate_search = self._new_search() if self.args.learning_rate_search else None
        if self.rate_search is not None:
            self.add_callback(self.rate_search)
        run = self._get_output_dir(args[0] if args else kwargs.get("trial"))
        listening = self._sigterm.listening(alone=self.group.world == 1)
        blamed = rows_blamed(self.train_dataset, self.model)
        with blamed, listening, undisturbed(run, self.group):
            checkpoint = chosen_checkpoint(resume_from_checkpoint, self.args.output_dir, self.group)
            return super().train(checkpoint, *args, **kwargs)

    def _begin(self) -> None:
        """Forget the last run, and follow the arguments as they are now."""
        self._group = start_group(self.args, self._group)
        self._lockstep = Lockstep(self.group, self.args, self._sigterm)
        EvenForwards.of(self.model, self.group)
        self.ledger: Ledger = Ledger()
        self.positions, self.gathered = PositionCounter(), GatheredMetrics(self)
        self.layout = Layout()
        self.element_mean = ElementMean(self.model, logged=self.recorder is not None)
        self._session: GradientSession | None = None

    def _new_search(self) -> RateSearch:
        return RateSearch()

    @property
    def session(self) -> GradientSession:
        """What the run has learned about its gradient; it begins at the first access."""
        if self._session is None:
            self._session = self._new_session(whole=self.compute_loss_func is not None)
        return self._session

    def _new_session(self, *, whole: bool) -> GradientSession:
        return self._start_session(
            self.args,
            self.model,
            self.group,
            lambda forward: self.ledger.metered(forward),  # each run has a ledger of its own
            objective=self.objective,
            whole=whole,
            check=self._check_batch,
        )

    def _check_batch(self, batch: Batch) -> None:
        if not self.can_return_loss:
            check_labels(batch.forward, batch.inputs, self.label_names)

    def training_step(
        self, model: nn.Module, inputs: Inputs, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Estimate the gradient from perturbed forwards and add it to `.grad`, in place of loss and
        backward.

        If the model's own loss stops working per row, the batch is estimated again with a loss that
        is computed for each row, or with that of whole batches, and training continues with that.

        Returns:
            The batch's share of the optimizer step's mean loss, a detached scalar.

        Raises:
            ObjectiveError: the loss does not work, or not the way that the arguments want it.
            NonFiniteError: not one perturbed row has a finite loss.
        """
        optimizer = self.optimizer
        if optimizer is not None and hasattr(optimizer, "train"):
            optimizer.train()  # it is schedule-free
        inputs = without_cache(self.model, with_plain_flag(self._prepare_inputs(inputs)))
        self._lockstep.check(model, inputs, self.state.global_step)
        batch = batch_of(self, model, self.layout.by_sample(self, inputs))
        position = self.positions.place(batch, seed_of(self.args), self.state.epoch)
        while True:
            try:
                return estimate_batch(self, model, batch, position, num_items_in_batch)
            except RowLossError as error:
                recorded = self.recorder is not None and self.recorder.begun
                self.session.fall_back(error, recorded=recorded)
            except HandOver:
                self._session = self._new_session(whole=True)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the stock trainer does, with rows, the estimator's metrics and the rate in use."""
        if "loss" in logs:
            sent = {"sent_bytes": self.group.sent} if self.group.world > 1 else {}
            logs = {**logs, **self.session.log(), **self.ledger.summary(), **sent}
        if self.rate_search is not None:
            logs = self.rate_search.scaled(logs)
        super().log(self.noise_guard.scaled(logs), *args, **kwargs)

    def floating_point_ops(self, inputs: Inputs) -> int:
        """Count 2 operations per parameter, token and row: a third of the stock count per row."""
        queries = self.session.rows(1, self.state.global_step)
        return super().floating_point_ops(dict(inputs)) // 3 * queries // self.args.world_size

    def _parts(self) -> dict[str, Stateful]:
        return parts_of(self)


class FlopsTrainer(FlopsTrainerMixin, Trainer):
    """`transformers.Trainer` that trains with forward passes only; see `FlopsTrainerMixin` for what
    it adds.

    References:
        Ren et al. (2025), FLOPS: Forward Learning with OPtimal Sampling, arXiv 2410.05966.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> config = ViTConfig(**small, intermediate_size=8, image_size=4, patch_size=2)
        >>> model = ViTForImageClassification(config)
        >>> images = [{"pixel_values": torch.rand(3, 4, 4), "labels": i % 2} for i in range(8)]
        >>> args = FlopsTrainingArguments("outputs", max_steps=1, use_cpu=True)
        >>> adapter = LoraConfig(target_modules="all-linear", modules_to_save=["classifier"])
        >>> trainer = FlopsTrainer(model, args, train_dataset=images, peft_config=adapter)
        >>> trainer.train().global_step
        {...
        1
    """
