"""Checks of the training arguments, before anything is built."""

from __future__ import annotations

import logging
import math
from contextlib import suppress
from typing import TYPE_CHECKING

from ..allocators import ALLOCATORS
from ..distributed.launch import check_environment, check_world
from ..errors import ConfigurationError
from ..estimators import ESTIMATORS
from .presets import CHOICES, PRESETS

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .args import FlopsArgumentsMixin

logger = logging.getLogger(__name__)
# Stock options that forward-only training cannot follow, and why.
_UNSUPPORTED = {
    "fsdp": "it shards what is trained too, for the backward pass; apply torch's fully_shard to "
    "the model instead, or load it with DistributedConfig(fsdp_size=...): the trainer follows both",
    "deepspeed": "DeepSpeed takes the training step over, and its stages divide gradients and "
    "states of a backward pass, which there is not",
    "use_liger_kernel": "Liger kernels fuse the loss, which must be seen row by row",
    "neftune_noise_alpha": "NEFTune adds noise of its own to the embeddings",
    "torch_compile": "a compiled model hides its layers and its loss, which must be seen row by "
    "row",
    "torch_compile_backend": "it switches torch_compile on",
    "torch_compile_mode": "it switches torch_compile on",
}
# Terms of the gradient that are dense, so that a trajectory log cannot hold them: value without
# the term, and what is dense.
_DENSE: dict[str, tuple[object, str]] = {
    "closed_form_head": ("none", "its gradient is dense"),
    "control_variate": ("none", "its predictions are dense"),
}


def check_own_options(args: FlopsArgumentsMixin) -> None:
    """Check the options of forward-only training, and fill in those that the preset decides.

    Raises:
        ConfigurationError: a value is unknown or out of range, or two options exclude each other.
    """
    check_environment()
    _check_choices(args)
    _fill_in(args)
    _check_scalars(args)
    _convert_numbers(args)
    _check_numbers(args)


def check_stock_options(args: TrainingArguments) -> None:
    """Refuse, or switch off, options of `TrainingArguments` that belong to the backward pass.

    Raises:
        ConfigurationError: an option needs a backward pass, or a fixed learning rate.
    """
    optimizer = str(getattr(args.optim, "value", args.optim))
    _check_rate(args, optimizer)  # type: ignore[arg-type]
    _require(
        not args.fp16,
        "fp16=True is not supported: forward differences need no loss scaling and lose their "
        "digits in fp16; use bf16=True or fp32.",
    )
    for name, reason in _UNSUPPORTED.items():
        value = getattr(args, name, None)
        _require(not value, f"{name}={value!r} is not supported: {reason}.")
    _require(
        "lomo" not in optimizer,
        f"optim={optimizer!r} is not supported: it fuses the update with backward.",
    )
    # no activations are stored for a backward pass
    args.activation_checkpointing = args.gradient_checkpointing = None


def check_processes(args: TrainingArguments) -> None:
    """Check the options that depend on the number of processes.

    Raises:
        ConfigurationError: processes do not know each other, or a trajectory log is asked of
            several.
    """
    check_world(args.world_size)
    _require(
        not args.trajectory_log or args.world_size == 1,  # type: ignore[attr-defined]
        "trajectory_log=True needs all numbers of a step in one process: use one process, or "
        "switch it off.",
    )


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ConfigurationError(message)


def _check_choices(args: FlopsArgumentsMixin) -> None:
    if isinstance(args.closed_form_head, bool):
        args.closed_form_head = "solve" if args.closed_form_head else "none"
    for name, choices in CHOICES.items():
        value = getattr(args, name)
        _require(
            value is None or value in choices,
            f"{name}={value!r} is unknown: choose one of {', '.join(choices)}.",
        )


def _fill_in(args: FlopsArgumentsMixin) -> None:
    """Give the options that are None their value."""
    defaults = PRESETS[args.preset]
    if args.reduce == "scalars" and args.control_variate is None:
        if defaults["control_variate"] != "none":
            logger.warning(
                'reduce="scalars" switches the control variate off: it is fitted to gradients, '
                "which processes do not exchange."
            )
        args.control_variate = "none"
    if args.trajectory_log:
        defaults = defaults | _replayable(args)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    searched = args.learning_rate_search or args.learning_rate == "auto"
    if searched and args.closed_form_head == "solve":
        logger.info(
            "closed_form_head='gradient' is used in a run with a learning rate search: a solved "
            "head fits the parameters of the moment, which a line search would then find best."
        )
        args.closed_form_head = "gradient"


def _replayable(args: FlopsArgumentsMixin) -> dict[str, object]:
    """Return the defaults of a logged run: everything that is not a number per query is off."""
    for name, (value, reason) in _DENSE.items():
        wanted = getattr(args, name)
        _require(
            wanted in (None, value),
            f"{name}={wanted!r} cannot be replayed from a trajectory log ({reason}, not a number "
            f"per query): leave it out, set {name}={value!r}, or switch trajectory_log off.",
        )
    _require(
        args.perturbation != "activation",
        'perturbation="activation" cannot be replayed from a trajectory log, because its noise is '
        'not known without a forward pass: use "auto", "rowwise" or "shared", or switch '
        "trajectory_log off.",
    )
    if unset := [name for name in _DENSE if getattr(args, name) is None]:
        logger.warning(
            "trajectory_log switches off what is not a number per query: %s.", ", ".join(unset)
        )
    return {name: value for name, (value, _) in _DENSE.items()}


def _check_scalars(args: FlopsArgumentsMixin) -> None:
    if args.reduce != "scalars":
        return
    _require(
        args.control_variate == "none",
        f"control_variate={args.control_variate!r} is fitted to gradients, which processes do not "
        "exchange with reduce='scalars': use reduce='gradient', or 'none'.",
    )
    _require(
        args.perturbation != "activation",
        "perturbation='activation' needs the forwards of all rows to draw its noise again, "
        "which reduce='scalars' would do in every process: use reduce='gradient', or 'auto'.",
    )


def _convert_numbers(args: FlopsArgumentsMixin) -> None:
    """Convert the text of a command line to numbers, where it is one."""
    if args.rows_per_forward is None:
        args.rows_per_forward = "auto"
    for name, kind in (
        ("rows_per_forward", int),
        ("perturbation_scale", float),
        ("queries_per_sample", int),
        ("learning_rate", float),
    ):
        value = getattr(args, name)
        if isinstance(value, str):
            with suppress(ValueError):  # "auto", or what the checks refuse
                setattr(args, name, kind(value))


def _check_numbers(args: FlopsArgumentsMixin) -> None:
    queries, scale, limit = args.queries_per_sample, args.perturbation_scale, args.memory_limit_gb
    count, positive = "a whole number, 1 or more", "positive and finite"
    for name, fine, wanted in (
        (
            "queries_per_sample",
            queries == "auto" or _is_count(queries),
            f"{count} (2 or more to estimate a gradient), or 'auto'",
        ),
        ("max_queries", args.max_queries is None or _is_count(args.max_queries), count),
        (
            "perturbation_scale",
            scale in (None, "auto") or _is_positive(scale),
            f"{positive}, or 'auto'",
        ),
        ("prefix_cache_gb", args.prefix_cache_gb > 0, "positive"),
        (
            "rows_per_forward",
            args.rows_per_forward == "auto" or _is_count(args.rows_per_forward),
            f"{count}, or 'auto'",
        ),
        ("delta_clip", args.delta_clip is None or _is_positive(args.delta_clip), positive),
        ("memory_limit_gb", limit is None or _is_positive(limit), positive),
    ):
        _require(fine, f"{name}={getattr(args, name)!r} must be {wanted}.")
    _require(
        args.late_expansion or args.prefix_cache is None, "prefix_cache needs late_expansion=True."
    )
    estimator = ESTIMATORS[str(args.estimator)]
    clean = estimator.baseline or ALLOCATORS[str(args.allocator)].needs_clean
    least = len(estimator.signs) + clean
    _require(
        not isinstance(queries, int) or queries >= least,
        f"queries_per_sample={queries} is too few: estimator={args.estimator!r} with "
        f"allocator={args.allocator!r} needs at least {least} rows per sample, the clean one "
        "included.",
    )


def _check_rate(args: FlopsArgumentsMixin, optimizer: str) -> None:
    if args.learning_rate == "auto":
        args.learning_rate = 1e-3
        args.learning_rate_search = True
    _require(
        not isinstance(args.learning_rate, str),
        f"learning_rate={args.learning_rate!r} must be a number, or 'auto'.",
    )
    if not args.learning_rate_search:
        return
    _require(
        not args.trajectory_log,
        "trajectory_log=True cannot replay a learning rate search, which moves parameters by "
        "more than estimates: give learning_rate a number, or switch one of the two off.",
    )
    _require(
        "schedule_free" not in optimizer,
        f"optim={optimizer!r} does not work with a learning rate search, as it trains at other "
        "points than it keeps: choose another.",
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 < value < math.inf
