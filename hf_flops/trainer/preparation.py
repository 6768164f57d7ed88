"""What is checked or prepared before the first step, so that a run that cannot work does not
start.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from ..base.batch import Inputs
from ..distributed.launch import check_environment, check_world
from ..errors import ConfigurationError, ObjectiveError
from ..objectives import Forward
from .args import FlopsArgumentsMixin
from .master_weights import keep_masters

logger = logging.getLogger(__name__)


def check_arguments(args: Any) -> None:
    """Refuse arguments of the wrong class and processes that do not know each other; switch off
    what is not for us.
    """
    if not issubclass(type(args), FlopsArgumentsMixin):
        raise ConfigurationError(
            f"args is a {type(args).__name__}: use FlopsTrainingArguments, or put "
            "FlopsArgumentsMixin before your class."
        )
    check_environment()
    check_world(args.world_size)
    args._n_gpu = min(args.n_gpu, 1)  # no DataParallel
    if args.world_size > 1:
        # every process reads, and counts, the tokens of all
        args.average_tokens_across_devices = False
    args.enable_jit_checkpoint = False  # `SaveOnSigterm` saves on SIGTERM, in all processes alike


def check_ready(model: nn.Module, data: Any, needs_clean: bool, samples: int) -> None:
    """Refuse a model or a data set that leaves nothing to train, and say if batches of one leave
    nothing to share out.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigurationError(
            "The model has no trainable parameter: add an adapter (peft_config=) or unfreeze a "
            "head."
        )
    if data is not None and hasattr(data, "__len__") and len(data) == 0:
        raise ConfigurationError("train_dataset is empty: there is nothing to train on.")
    if needs_clean and samples == 1:
        logger.warning(
            "per_device_train_batch_size=1 leaves the allocator nothing to share out: use larger "
            "batches with fewer queries_per_sample."
        )


def check_labels(forward: Forward, inputs: Inputs, names: Sequence[str]) -> None:
    """Refuse a batch without labels, of a model that makes no loss without them, as an autoencoder
    does.

    Args:
        forward: runs the model.
        inputs: the batch.
        names: what labels are called.
    """
    if any(name in inputs for name in names):
        return
    try:
        loss = forward(inputs)[0]
    except (AttributeError, KeyError, TypeError, ValueError):
        loss = None
    if loss is None:
        raise ObjectiveError(
            f"The batch has no labels: its keys are {sorted(inputs)}, and none of {names} is "
            "among them."
        )


def wrap_with_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    """Put an adapter on a plain model."""
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ConfigurationError("The model is a PeftModel already: pass it without peft_config.")
    return get_peft_model(model, peft_config)


def widen_trainable(model: nn.Module) -> None:
    """Keep trainable parameters of a 16-bit model in float32, and say so."""
    names = keep_masters(model)
    if names:
        logger.warning(
            "%d trainable tensors are kept in float32, as 16 bits would round small updates away "
            "(%s, ...).",
            len(names),
            names[0],
        )


@contextmanager
def quantised_base_allowed(model: Any) -> Iterator[None]:
    """Let the stock trainer accept a quantised model that cannot be trained by backprop; forward
    passes are enough here.

    The stock check passes over models that carry an adapter of their own, so this one says for a
    while that it does.
    """
    flag = "_hf_peft_config_loaded"
    if (
        not isinstance(model, nn.Module)
        or not getattr(model, "is_quantized", False)
        or flag in vars(model)
    ):
        yield
        return
    setattr(model, flag, True)
    try:
        yield
    finally:
        delattr(model, flag)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and batch-norm updates off for a while, and put every module back as it
    was.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def without_cache(model: nn.Module, inputs: Inputs) -> Inputs:
    """Tell a language model to keep no keys and values, which only generation needs, unless the
    batch says otherwise.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    if "use_cache" in inputs or "use_cache" not in inspect.signature(base.forward).parameters:
        return inputs
    return {**inputs, "use_cache": False}


def shared_texts(model: nn.Module, inputs: Inputs, clean: bool) -> AbstractContextManager[None]:
    """Let a model that can, as `SuffixPromptModel` does, run what all rows of a batch's samples
    share once for a step.

    With `clean`, the samples will also be run as they are.
    """
    cached = getattr(model, "cached_texts", None)
    return nullcontext() if cached is None else cached(inputs, clean=clean)
