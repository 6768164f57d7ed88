"""Training arguments: what forward-only training adds to `transformers.TrainingArguments`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..allocators import ALLOCATORS
from ..distributed.exchange import REDUCE
from ..distributed.launch import check_environment, check_world
from ..errors import ConfigurationError
from ..estimators import ESTIMATORS
from ..perturbations import DISTRIBUTIONS
from .presets import CHOICES, LORA_PARTS, PRESETS
from .validation import replayable

logger = logging.getLogger(__name__)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigurationError(message)


def _number(kind: type, value: Any) -> Any:
    """Convert the text of a command line to a number, if it is one."""
    try:
        return kind(value) if isinstance(value, str) else value
    except ValueError:
        return value


@dataclass
class FlopsArgumentsMixin:
    """The fields of forward-only training, to be put in front of any class derived from
    `TrainingArguments`.

    Options that are None take the value of the preset.

    Raises:
        ConfigurationError: a value is unknown or out of range, or a stock option needs a backward
            pass.
    """

    learning_rate: float | str | None = field(
        default=1e-3,
        metadata={
            "help": "Step size of the optimizer; forward-only training of adapters needs about "
            "1e-3. Or 'auto': 1e-3 to start with, and learning_rate_search."
        },
    )
    learning_rate_search: bool = field(
        default=False,
        metadata={
            "help": "Multiply the schedule's rates by a factor that line searches along the "
            "recent updates determine, starting from learning_rate; a search costs about three "
            "rows per sample, after 1, 2, 4, ... and then every 32 steps."
        },
    )
    preset: str = field(
        default="flops",
        metadata={
            "help": "Values of the options below that are not given: 'flops' (ours), 'mezo' "
            "(n-SPSA as published) or 'flops-authors' (the heuristic of the code published with "
            "FLOPS, biased; for comparison).",
            "choices": list(PRESETS),
        },
    )
    queries_per_sample: int | str | None = field(
        default=16,
        metadata={
            "help": "Rows of forward passes per sample and step, averaged over the batch, the "
            "clean (unperturbed) row included; or 'auto': few while the gradient is clear, more "
            "as its signal fades."
        },
    )
    max_queries: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of rows in training, self-checks included: training stops "
            "cleanly before a step that would exceed it. Default: no limit."
        },
    )
    allocator: str | None = field(
        default=None,
        metadata={
            "help": "How queries are divided among the samples of a batch: "
            f"{', '.join(ALLOCATORS)}."
        },
    )
    estimator: str | None = field(
        default=None,
        metadata={
            "help": "'one_sided' (difference to the clean forward, one row per query) or "
            "'antithetic' (central difference, two rows per query)."
        },
    )
    perturbation: str | None = field(
        default=None,
        metadata={
            "help": "'rowwise' (independent noise on the weights for each row of a forward), "
            "'activation' (on the outputs of linear layers where a self-check confirms it), "
            "'shared' (one noise per query for the whole batch) or 'auto' (for every tensor the "
            "best of these that passes the self-check)."
        },
    )
    noise: str | None = field(
        default=None,
        metadata={
            "help": f"Distribution of the noise: {', '.join(sorted(DISTRIBUTIONS))}. 'rank_one' is "
            "for large adapters: also signs, but a matrix's noise is the outer product of two "
            "vectors."
        },
    )
    perturbation_scale: float | str | None = field(
        default=None,
        metadata={
            "help": "Step of the finite difference, epsilon, or 'auto': measured on the first "
            "batch with about 256 rows, as a power of the square root of ten. Default: 1e-3, or "
            "1e-2 where the model computes in 16 bits."
        },
    )
    rows_per_forward: int | str | None = field(
        default="auto",
        metadata={
            "help": "Rows per forward pass, or 'auto': the fastest size that fits in memory, "
            "tuned during the first steps. Changes the result by rounding only; a number makes "
            "runs repeat bit for bit."
        },
    )
    memory_limit_gb: float | None = field(
        default=None,
        metadata={
            "help": "GB that the rows of one forward pass may use on top of the model, noise "
            "included, where rows_per_forward='auto'. Default: 80 percent of what is free at the "
            "first step."
        },
    )
    closed_form_head: bool | None = field(
        default=None,
        metadata={
            "help": "Where a trainable linear layer outputs the logits of the loss, take its "
            "gradient from the clean forward (residual times input, exact) and perturb only the "
            "other parameters. Default: true, except for the presets 'mezo' and 'flops-authors'."
        },
    )
    control_variate: str | None = field(
        default=None,
        metadata={
            "help": "Prediction that is subtracted from deltas, with its exact mean added back: "
            "'logit_jacobian' (a mean Jacobian of the logits, fitted on past steps; for losses of "
            "up to 32 logits per row) or 'none'."
        },
    )
    lora_parts: str = field(
        default="both",
        metadata={
            "help": "LoRA matrices to train: 'both', 'B' alone (half the noise; lora_A matters "
            "only once lora_B is nonzero), or 'B_then_A', where lora_A joins after half of the "
            "steps.",
            "choices": list(LORA_PARTS),
        },
    )
    late_expansion: bool = field(
        default=True,
        metadata={
            "help": "Run unperturbed parts of the model, such as the layers below the first "
            "adapter, once per sample and step instead of once per row; does not change the "
            "result."
        },
    )
    pictures: bool = field(
        default=True,
        metadata={
            "help": "Plot the run into the output folder when it ends (learning curve, queries "
            "per sample and class, signal to noise), if matplotlib is installed and the log has "
            "three entries or more."
        },
    )
    prefix_cache: str | None = field(
        default=None,
        metadata={
            "help": "Keep the outputs of unperturbed layers from one epoch to the next, in "
            "'memory' or on 'disk' (in the output folder, deleted after the run). Needs a column "
            "sample_id, and inputs without augmentation."
        },
    )
    prefix_cache_gb: float = field(
        default=4.0, metadata={"help": "Size limit of prefix_cache, in gigabytes."}
    )
    trajectory_log: bool = field(
        default=False,
        metadata={
            "help": "Write trajectory.log into the output folder, from which the adapter of every "
            "step can be rebuilt bit for bit, without data or forward passes (hf-flops replay), "
            "in a few bytes per query. Disables closed_form_head and control_variate, whose terms "
            "are more than a number per query."
        },
    )
    noise_seed: int | None = field(
        default=None, metadata={"help": "Seed of the perturbations. Default: the seed of the run."}
    )

    reduce: str = field(
        default="gradient",
        metadata={
            "help": "What processes exchange: 'gradient' (the adapter's gradient is summed, once "
            "per optimizer step) or 'scalars' (losses and seeds, a few bytes per query; every "
            "process draws all noise).",
            "choices": list(REDUCE),
        },
    )

    def __post_init__(self) -> None:
        check_environment()
        self._check_choices()
        self._check_scalars()
        self._check_numbers()
        self._check_rate()
        self._check_stock_options()
        super().__post_init__()  # type: ignore[misc]
        check_world(self.world_size)  # type: ignore[attr-defined]
        _require(
            not self.trajectory_log or self.world_size == 1,  # type: ignore[attr-defined]
            "trajectory_log=True is for one process, as of several none has all numbers: use one, "
            "or switch it off.",
        )

    def _check_choices(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            _require(
                value is None or value in choices,
                f"{name}={value!r} is unknown: choose one of {', '.join(choices)}.",
            )
        if (
            self.reduce == "scalars"
            and self.control_variate is None
            and PRESETS[self.preset]["control_variate"] != "none"
        ):
            logger.warning(
                'reduce="scalars" goes without a control variate, which learns from what does not '
                "travel."
            )
            self.control_variate = "none"
        defaults = PRESETS[self.preset] | (replayable(self) if self.trajectory_log else {})
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _check_scalars(self) -> None:
        _require(
            self.reduce != "scalars" or self.control_variate == "none",
            f"control_variate={self.control_variate!r} learns from gradients, which do not travel "
            "with reduce='scalars': use reduce='gradient', or 'none'.",
        )
        _require(
            self.reduce != "scalars" or self.perturbation != "activation",
            "perturbation='activation' needs the forwards of all rows to draw its noise again, "
            "which reduce='scalars' would do in every process: use reduce='gradient', or 'auto'.",
        )

    def _check_numbers(self) -> None:
        self.rows_per_forward = _number(
            int, "auto" if self.rows_per_forward is None else self.rows_per_forward
        )
        self.perturbation_scale = _number(float, self.perturbation_scale)
        self.queries_per_sample = _number(int, self.queries_per_sample)
        queries, scale, rows = (
            self.queries_per_sample,
            self.perturbation_scale,
            self.rows_per_forward,
        )
        _require(
            queries == "auto" or (isinstance(queries, int) and queries >= 1),
            f"queries_per_sample={queries!r} must be a whole number, 1 or more (2 or more to "
            "estimate a gradient), or 'auto'.",
        )
        most = self.max_queries
        _require(
            most is None or (isinstance(most, int) and most >= 1),
            f"max_queries={most!r} must be a whole number, 1 or more.",
        )
        least = ESTIMATORS[str(self.estimator)]
        clean = least.baseline or ALLOCATORS[str(self.allocator)].needs_clean
        _require(
            queries == "auto" or queries >= len(least.signs) + clean,  # type: ignore[operator]
            f"queries_per_sample={queries} is too few: estimator={self.estimator!r} with "
            f"allocator={self.allocator!r} needs at least {len(least.signs) + clean} rows per "
            "sample, the clean one included.",
        )
        fine = scale in (None, "auto") or (
            isinstance(scale, (int, float)) and 0 < scale < float("inf")
        )
        _require(fine, f"perturbation_scale={scale!r} must be positive and finite, or 'auto'.")
        _require(
            self.late_expansion or self.prefix_cache is None,
            "prefix_cache needs late_expansion=True.",
        )
        _require(
            self.prefix_cache_gb > 0, f"prefix_cache_gb={self.prefix_cache_gb!r} must be positive."
        )
        whole = isinstance(rows, int) and rows >= 1
        _require(
            rows == "auto" or whole,
            f"rows_per_forward={rows!r} must be a whole number, 1 or more, or 'auto'.",
        )
        limit = self.memory_limit_gb
        _require(
            limit is None or 0 < limit < float("inf"),
            f"memory_limit_gb={limit!r} must be positive and finite.",
        )

    def _check_rate(self) -> None:
        rate = self.learning_rate = _number(float, self.learning_rate)
        if rate == "auto":
            self.learning_rate, self.learning_rate_search = 1e-3, True
        _require(
            not isinstance(rate, str) or rate == "auto",
            f"learning_rate={rate!r} must be a number, or 'auto'.",
        )
        _require(
            not (self.learning_rate_search and self.trajectory_log),
            "trajectory_log=True cannot replay a learning rate search, which moves parameters by "
            "more than estimates: give learning_rate a number, or switch one of the two off.",
        )
        optimizer = str(getattr(self.optim, "value", self.optim))  # type: ignore[attr-defined]
        _require(
            not self.learning_rate_search or "schedule_free" not in optimizer,
            f"optim={optimizer!r} is not for a learning rate search, as it trains at other points "
            "than it keeps: choose another.",
        )

    def _check_stock_options(self) -> None:
        """Refuse, or quietly switch off, options of `TrainingArguments` that belong to the backward
        pass.
        """
        given: Any = self
        _require(
            not given.fp16,
            "fp16=True is not supported: forward differences need no loss scaling and lose their "
            "digits in fp16; use bf16=True or fp32.",
        )
        for name, what in (
            ("fsdp", "FSDP shards the model for the backward pass"),
            ("deepspeed", "DeepSpeed takes the training step over"),
            ("use_liger_kernel", "Liger kernels fuse the loss, which must be seen row by row"),
            ("neftune_noise_alpha", "NEFTune adds noise of its own to the embeddings"),
            (
                "torch_compile",
                "a compiled model hides its layers and its loss, which must be seen row by row",
            ),
            ("torch_compile_backend", "it switches torch_compile on"),
            ("torch_compile_mode", "it switches torch_compile on"),
        ):
            _require(
                not getattr(given, name, None),
                f"{name}={getattr(given, name, None)!r} is not supported: {what}.",
            )
        optimizer = str(getattr(given.optim, "value", given.optim))
        _require(
            "lomo" not in optimizer,
            f"optim={optimizer!r} is not supported: it fuses the update with backward.",
        )
        # nothing is kept for a backward pass
        given.activation_checkpointing = given.gradient_checkpointing = None


@dataclass
class FlopsTrainingArguments(FlopsArgumentsMixin, TrainingArguments):  # type: ignore[misc]
    """`transformers.TrainingArguments` with the fields of `FlopsArgumentsMixin`."""
