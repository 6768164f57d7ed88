"""Training arguments: what forward-only training adds to `transformers.TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..allocators import ALLOCATORS
from ..distributed.exchange import REDUCE
from ..perturbations import DISTRIBUTIONS
from .presets import HEADS, LORA_PARTS, PRESETS
from .validation import check_own_options, check_processes, check_stock_options


@dataclass
class FlopsArgumentsMixin:
    """The fields of forward-only training, to be put in front of any class derived from
    `TrainingArguments`.

    Options that are None take the value of the preset.

    Raises:
        ConfigurationError: a value is unknown or out of range, or a stock option needs a backward
            pass.

    Examples:
        >>> from dataclasses import dataclass
        >>> from transformers import Seq2SeqTrainingArguments
        >>> @dataclass
        ... class Arguments(FlopsArgumentsMixin, Seq2SeqTrainingArguments):
        ...     pass
        >>> args = Arguments(predict_with_generate=True, preset="mezo", use_cpu=True)
        >>> args.estimator, args.predict_with_generate
        ('antithetic', True)
    """

    learning_rate: float | str | None = field(
        default=1e-3,
        metadata={
            "help": "Step size of the optimizer. The default is safe for every adapter; 1e-2 is a "
            "good start for LoRA's B matrices. Or 'auto': 1e-3 to start with, and "
            "learning_rate_search."
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
        default=8,
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
            "1e-2 where the model computes in 16 bits, or less where the first batch shows "
            "curvature."
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
    closed_form_head: str | None = field(
        default=None,
        metadata={
            "help": "What trains a linear layer that outputs the logits of the loss, which needs "
            "no noise: 'solve' (its weights minimise the loss on the features that clean forwards "
            "have shown, after every step), 'gradient' (its exact gradient goes to the optimizer) "
            "or 'none' (noise, as for the other parameters). The projections of two encoders "
            "under a contrastive loss are treated alike. Default: 'solve', except for the "
            "presets 'mezo' and 'flops-authors'.",
            "choices": list(HEADS),
        },
    )
    control_variate: str | None = field(
        default=None,
        metadata={
            "help": "Prediction that is subtracted from deltas, with its exact mean added back: "
            "'feature_jacobian' (a Jacobian of the logits, linear in principal components of the "
            "sample's features and fitted on past steps; for losses of up to 32 logits per row), "
            "'logit_jacobian' (the same Jacobian for all samples) or 'none'."
        },
    )
    delta_clip: float | None = field(
        default=None,
        metadata={
            "help": "Limit deltas to so many robust standard deviations of their batch's (1.5, "
            "say). The estimate is then biased; it helps early in training, if at all. Not with "
            "noise on outputs. Default: no limit."
        },
    )
    lora_parts: str = field(
        default="auto",
        metadata={
            "help": "LoRA matrices to train: 'both', 'B' alone (half the noise; lora_A matters "
            "only once lora_B is nonzero), 'B_then_A', where lora_A joins after half of the "
            "steps, or 'auto': 'B' for an adapter whose lora_B is zero, as that of a new one "
            "is, else 'both'.",
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
        check_own_options(self)
        check_stock_options(self)  # type: ignore[arg-type]
        super().__post_init__()  # type: ignore[misc]
        check_processes(self)  # type: ignore[arg-type]


@dataclass
class FlopsTrainingArguments(FlopsArgumentsMixin, TrainingArguments):  # type: ignore[misc]
    """`transformers.TrainingArguments` with the fields of `FlopsArgumentsMixin`.

    Examples:
        >>> args = FlopsTrainingArguments("outputs", queries_per_sample=8, use_cpu=True)
        >>> args.allocator, args.estimator
        ('optimal', 'one_sided')
    """
