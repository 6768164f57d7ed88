"""FlopsTrainer: `transformers.Trainer` with a training step that only runs the model forward."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer

from .allocators import ALLOCATORS, Allocator
from .args import FlopsArgumentsMixin, FlopsTrainingArguments, check_processes
from .errors import ConfigurationError, ObjectiveError
from .estimators import ESTIMATORS, Estimator
from .objectives import CallableObjective, Objective
from .perturbations import Perturbation
from .rows import batch_size
from .selfcheck import choose_objective, choose_perturbation, precision_of
from .step import Method, Place, StepResult, estimate_gradient

logger = logging.getLogger(__name__)
SAMPLE_ID = "sample_id"
STATE_FILE = "flops_state.json"
_NOISE_BYTES = 256 * 2**20


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and batch-norm updates off for a while, and put every module back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class FlopsTrainerMixin:
    """Forward-only training for any class derived from `transformers.Trainer`: `class T(FlopsTrainerMixin, SomeTrainer)`.

    A data set column `sample_id` (whole numbers) never reaches the model; it lets the trainer count queries per sample, and
    the allocator remember what a sample's deltas were.

    Attributes:
        rows_used: rows that went through the model in training so far.
        sample_queries: sample id → [steps that the sample took part in, queries that it got].
        last_step: what the last micro-batch found, a `StepResult`.

    Args:
        model: a model with trainable parameters, or a plain one together with `peft_config`.
        args: `FlopsTrainingArguments`, or any arguments class with `FlopsArgumentsMixin`.
        peft_config: a PEFT configuration to wrap the model with.
        objective: what to minimise instead of the model's own loss: an `Objective`, or a function that maps (outputs,
            inputs) of R rows to (R,) losses; it needs no derivative.
        allocator: an instance, in place of the name in `args`.
        estimator: an instance, in place of the name in `args`.
        perturbation: an instance, in place of the name in `args`; it skips the self-check.
        kwargs: everything else that the stock trainer takes.

    Raises:
        ConfigurationError: nothing is trainable, the data set is empty, several processes, or unsuitable arguments.
    """

    _tag_names: ClassVar = ["hf-flops", "forward-only", "zeroth-order"]
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
        _check_arguments(args)
        self._peft_config = peft_config
        if peft_config is not None and isinstance(model, nn.Module):
            model = _wrapped(model, peft_config)
        plain = objective is None or hasattr(objective, "per_row")
        self._objective: Any = objective if plain else CallableObjective(objective)  # type: ignore[arg-type]
        self._own_objective = objective is not None
        self._allocator: Allocator = allocator or ALLOCATORS[args.allocator]()
        self._estimator: Estimator = estimator or ESTIMATORS[args.estimator]()
        self._perturbation = self._given_perturbation = perturbation
        self._window: dict[str, list[float]] = {}
        self._position, self._position_step, self.rows_used = 0, -1, 0
        self._ids: list[int] | None = None
        self.sample_queries: dict[int, list[int]] = {}
        self.last_step: StepResult | None = None
        super().__init__(model, args, *positional, **kwargs)  # type: ignore[call-arg]
        _check_ready(self)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Build the model as the stock trainer does, and wrap it with `peft_config`."""
        model = super().call_model_init(trial)  # type: ignore[misc]
        return model if self._peft_config is None else _wrapped(model, self._peft_config)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the stock trainer does; the method is chosen anew at the first step."""
        self._perturbation, self._position_step = self._given_perturbation, -1
        if not self._own_objective:
            self._objective = None
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def training_step(
        self: Any, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Estimate the gradient from perturbed forwards and add it to `.grad`, in place of loss and backward.

        Returns:
            The batch's share of the optimizer step's mean loss, a detached scalar.
        """
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        with evaluation_mode(model), torch.no_grad(), self.compute_loss_context_manager():
            forward = self._forward_function(model)
            if self._objective is None or self._perturbation is None:
                self._set_up(model, forward, inputs)
            method = self._method(batch_size(inputs))
            elements = self._elements(num_items_in_batch)
            batches = self.current_gradient_accumulation_steps
            result = estimate_gradient(forward, inputs, method, self._place(inputs), elements, batches)
        self._record(result)
        return result.loss.to(self.args.device)

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
            return lambda inputs: (None, model(**inputs))
        if self.compute_loss_func is None:
            return lambda inputs: self.compute_loss(model, dict(inputs), return_outputs=True)

        def forward(inputs: Mapping[str, Any]) -> tuple[Tensor | None, Any]:
            # A user's function may divide by the count, so it gets that of these rows: the loss is their mean.
            items = self._get_num_items_in_batch([inputs], self.args.device)
            return self.compute_loss(model, dict(inputs), return_outputs=True, num_items_in_batch=items)

        return forward

    def _set_up(self: Any, model: nn.Module, forward: Any, inputs: dict[str, Any]) -> None:
        """Choose objective and perturbation with the first batch, and say what was not as hoped."""
        named = [name for name in self.label_names if name in inputs]
        if not self._own_objective and not self.can_return_loss and not named:
            raise ObjectiveError(
                f"The batch has no labels: its keys are {sorted(inputs)}, and none of {self.label_names} is among them."
            )
        precision = precision_of(self.model, autocast=self.args.bf16)
        if self._objective is None:
            self._objective, reason = choose_objective(forward, inputs, precision)
            if reason and self.args.perturbation == "rowwise":
                raise ObjectiveError(f'perturbation="rowwise" needs a loss per row, but {reason}; pass objective=.')
            if reason:
                logger.warning("The loss is taken for the batch as a whole, with shared noise: %s.", reason)
        if self._perturbation is None:
            self._perturbation, notes = choose_perturbation(
                self.model,
                self._objective,
                forward,
                inputs,
                mode=self.args.perturbation,
                distribution=self.args.noise,
                precision=precision,
            )
            for note in notes:
                logger.warning("%s", note)

    def _method(self: Any, samples: int) -> Method:
        """Put the method together for a batch of this many samples."""
        args, dimension = self.args, self._perturbation.vector.size
        half = args.bf16 or any(p.dtype == torch.bfloat16 for p in self._perturbation.vector.parameters)
        rows = args.rows_per_forward
        if rows is None:
            # The batch is known to fit; noise is what query rows need beyond that.
            rows = max(1, min(max(samples, 32), _NOISE_BYTES // (4 * dimension)))
        return Method(
            objective=self._objective,
            perturbation=self._perturbation,
            estimator=self._estimator,
            allocator=self._allocator,
            queries_per_sample=args.queries_per_sample,
            scale=args.perturbation_scale or (1e-2 if half else 1e-3),
            rows_per_forward=rows,
        )

    def _place(self: Any, inputs: dict[str, Any]) -> Place:
        """Return where the batch lies in the run: micro-batches of one optimizer step follow each other."""
        step = self.state.global_step
        if step != self._position_step:
            self._position, self._position_step = 0, step
        position = self._position
        self._position += batch_size(inputs)
        seed = self.args.seed if self.args.noise_seed is None else self.args.noise_seed
        ids = None if self._ids is None else tuple(self._ids)
        return Place(seed=seed, step=step, position=position, epoch=self.state.epoch or 0.0, ids=ids)

    def _elements(self: Any, num_items_in_batch: Tensor | int | None) -> float | None:
        """Return the number of loss elements of the whole optimizer step, where the stock trainer's count is ours.

        Where it is not, the mean over micro-batches of each one's mean is followed.
        """
        if num_items_in_batch is not None and not self._own_objective and self._objective.per_row:
            return float(num_items_in_batch)
        return None

    def _record(self: Any, result: StepResult) -> None:
        """Keep what the next log shows, averaged over its steps."""
        self.last_step = result
        self.rows_used += result.rows
        if self._ids is not None and len(self._ids) == len(result.counts):
            for sample, count in zip(self._ids, result.counts.tolist(), strict=True):
                seen = self.sample_queries.setdefault(sample, [0, 0])
                seen[0], seen[1] = seen[0] + 1, seen[1] + count
        for name, value in result.metrics.items():
            self._window.setdefault(name, []).append(value)

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add rows used and the averages of the estimator's metrics to the training log."""
        if "loss" in logs and self._window:
            logs = {**logs, **_summary(self._window), "rows": self.rows_used}
            self._window = {}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count 2 operations per parameter, token and row: the third of the stock count, times the queries."""
        return super().floating_point_ops(inputs) // 3 * self.args.queries_per_sample  # type: ignore[misc, attr-defined]

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save:
            state = {"allocator": self._allocator.state_dict(), "rows": self.rows_used}
            unfinished = Path(output_dir, STATE_FILE + ".tmp")
            unfinished.write_text(json.dumps(state))
            unfinished.replace(Path(output_dir, STATE_FILE))

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        path = Path(checkpoint or "", STATE_FILE)
        if checkpoint is not None and path.is_file():
            state = json.loads(path.read_text())
            self._allocator.load_state_dict(state["allocator"])
            self.rows_used = state["rows"]


def _wrapped(model: nn.Module, peft_config: Any) -> nn.Module:
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ConfigurationError("The model is a PeftModel already: pass it without peft_config.")
    return get_peft_model(model, peft_config)


def _check_arguments(args: Any) -> None:
    if not issubclass(type(args), FlopsArgumentsMixin):
        raise ConfigurationError(
            f"args is a {type(args).__name__}: use FlopsTrainingArguments, or put FlopsArgumentsMixin before your class."
        )
    check_processes(args.world_size)
    args._n_gpu = min(args.n_gpu, 1)  # never DataParallel


def _check_ready(trainer: Any) -> None:
    """Refuse what cannot train before anything has run."""
    if not any(parameter.requires_grad for parameter in trainer.model.parameters()):
        raise ConfigurationError("The model has no trainable parameter: add an adapter (peft_config=) or unfreeze a head.")
    data, args = trainer.train_dataset, trainer.args
    if data is not None and hasattr(data, "__len__") and len(data) == 0:
        raise ConfigurationError("train_dataset is empty: there is nothing to train on.")
    if trainer._allocator.needs_clean and args.per_device_train_batch_size == 1:
        logger.warning(
            "per_device_train_batch_size=1 leaves the allocator nothing to share out: use larger batches with fewer "
            "queries_per_sample."
        )
    if hasattr(trainer.model, "add_model_tags"):
        trainer.model.add_model_tags(trainer._tag_names)


def _summary(window: dict[str, list[float]]) -> dict[str, float]:
    """Average a window of step metrics; a ratio is taken between averages, because single steps are too noisy."""
    mean = {name: sum(values) / len(values) for name, values in window.items()}
    signal, variance = mean.pop("gradient_signal"), mean.pop("gradient_variance")
    sample_signal, dropped = mean.pop("sample_signal"), sum(window["dropped_rows"])
    summary = {
        **mean,
        "dropped_rows": dropped,
        "signal_to_noise": max(signal, 0.0) / variance if variance > 0 else 0.0,
    }
    if signal > 0:
        # mean(||g_i||)^2 / B over ||g||^2: below 1, noise per row with the best counts beats shared noise.
        summary["noise_ratio"] = sample_signal / signal
    return {name: round(value, 6) for name, value in summary.items()}


class FlopsTrainer(FlopsTrainerMixin, Trainer):
    """`transformers.Trainer` that trains with forward passes only; see `FlopsTrainerMixin` for what it adds.

    References:
        Ren et al. (2025), FLOPS: Forward Learning with OPtimal Sampling, arXiv 2410.05966.
    """
