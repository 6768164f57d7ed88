"""Checks and preparations before the first step, so that a run that cannot work does not start."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

from accelerate import Accelerator
from torch import nn
from transformers import TrainingArguments

from ..base.batch import Inputs
from ..contrastive.dual_encoder import base_of
from ..distributed.launch import check_environment, check_world
from ..errors import ConfigurationError, ObjectiveError, in_one_line
from ..objectives import Forward
from ..prompts.black_box import BlackBoxPromptModel
from ..prompts.suffix_prompt import SuffixPromptModel
from .args import FlopsArgumentsMixin, FlopsTrainingArguments
from .master_weights import keep_masters
from .offload import is_offloaded, materialise_trainable, weights_at_hand
from .quantised import keep_unpacked, rounds_in_evaluation
from .sharding import refuse_tensor_parallelism, replicate_trainable

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)
_MANY = 100_000  # parameters of a whole model, not of an adapter or a test


def positional_arguments(positional: Sequence[object]) -> TrainingArguments | None:
    """Return the training arguments among a trainer's positional ones: DPOTrainer and others have
    something else in second place.
    """
    return next((each for each in positional if isinstance(each, TrainingArguments)), None)


def check_arguments(args: TrainingArguments) -> FlopsTrainingArguments:
    """Return a trainer's arguments, with stock features off that forward-only training replaces.

    Raises:
        ConfigurationError: the arguments are of the wrong class, or processes do not know each
            other.
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
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False  # there is no accelerator to pin memory for
    args.enable_jit_checkpoint = False  # `SaveOnSigterm` saves on SIGTERM, in all processes alike
    return cast(FlopsTrainingArguments, args)


def follow_accelerator(accelerator: Accelerator, args: TrainingArguments) -> None:
    """Take over what an accelerator has from its launcher or the environment, not from arguments.

    Raises:
        ConfigurationError: forward-only training cannot follow it.
    """
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ConfigurationError(
            f"accelerate's configuration says mixed_precision={accelerator.mixed_precision!r}, in "
            "which forward differences lose their digits: use bf16 or no."
        )
    args.bf16 = accelerator.mixed_precision == "bf16"
    backend = accelerator.state.dynamo_plugin.backend.value
    if backend != "NO":
        raise ConfigurationError(
            f"accelerate's configuration says dynamo_backend={backend!r}, but a compiled model "
            "hides its layers and its loss, which must be seen row by row: set it to no."
        )


def uncompiled(model: object) -> Any:
    """Return the model that `torch.compile` has wrapped; it trains without being compiled.

    Raises:
        ConfigurationError: the model is only a name.
    """
    if isinstance(model, str):
        raise ConfigurationError(
            f"model={model!r} is a name: load it, with from_pretrained of the class for your task."
        )
    if not isinstance(model, nn.Module):
        return model
    inner = getattr(model, "_orig_mod", model)
    compiled = [module for module in inner.modules() if module._compiled_call_impl is not None]
    for module in compiled:
        module._compiled_call_impl = None
    if inner is not model or compiled:
        logger.warning(
            "The model trains without torch.compile, which would hide its layers and its loss."
        )
    return inner


def without_autocast(model: object) -> None:
    """Undo what accelerate did to a model's forward for an earlier trainer in 16 bits."""
    if not isinstance(model, nn.Module) or "_original_forward" not in vars(model):
        return
    original = vars(model).pop("_original_forward")
    while hasattr(original, "__wrapped__"):
        original = original.__wrapped__
    function = getattr(original, "__func__", original)
    vars(model).pop("forward", None)
    if function is not type(model).forward:
        model.forward = MethodType(function, model)


def check_ready(model: nn.Module, data: object, needs_clean: bool, samples: int) -> None:
    """Refuse a model or data with nothing to train; warn if batches have nothing to allocate."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trainable and hasattr(model, "peft_config"):
        raise ConfigurationError(
            "The model has no trainable parameter: its adapter was loaded for inference. Load it "
            "with PeftModel.from_pretrained(..., is_trainable=True)."
        )
    if not trainable:
        raise ConfigurationError(
            "The model has no trainable parameter: add an adapter (peft_config=) or unfreeze a "
            "head."
        )
    if trainable >= _MANY and all(p.requires_grad for p in model.parameters()):
        logger.warning(
            "All %s parameters of the model are trained, which is too many for estimates: pass "
            "peft_config= for an adapter, or freeze what should stay.",
            f"{trainable:,}",
        )
    if isinstance(data, Sized) and len(data) == 0:
        raise ConfigurationError("train_dataset is empty: there is nothing to train on.")
    if needs_clean and samples == 1:
        logger.warning(
            "per_device_train_batch_size=1 leaves the allocator nothing to share out: use larger "
            "batches with fewer queries_per_sample."
        )


def check_labels(forward: Forward, inputs: Inputs, names: Sequence[str]) -> None:
    """Refuse a batch without labels, unless the model, as an autoencoder, needs none.

    Args:
        forward: runs the model.
        inputs: the batch.
        names: of the labels among the inputs.
    """
    if any(name in inputs for name in names):
        return
    with suppress(AttributeError, KeyError, TypeError, ValueError):
        if forward(inputs)[0] is not None:
            return
    raise ObjectiveError(
        f"The batch has no labels: its keys are {sorted(inputs)}, and none of {names} is among "
        "them."
    )


def wrap_with_adapter(model: nn.Module, peft_config: PeftConfig) -> nn.Module:
    """Put an adapter on a plain model."""
    from peft import PeftModel, get_peft_model

    name = type(model).__name__
    if isinstance(model, PeftModel):
        raise ConfigurationError("The model is a PeftModel already: pass it without peft_config.")
    if isinstance(model, (SuffixPromptModel, BlackBoxPromptModel)):
        raise ConfigurationError(
            f"A {name} has a prompt to train and a frozen base: pass it without peft_config."
        )
    with warnings.catch_warnings():
        # PEFT asks transformers by a name of before
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        try:
            with weights_at_hand(peft_config) if is_offloaded(model) else nullcontext():
                return get_peft_model(model, peft_config)
        except ValueError as error:
            if "arget modules" not in str(error):
                raise
            layers = {
                n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is nn.Linear
            }
            raise ConfigurationError(
                f"peft_config does not suit the model: {in_one_line(error)}. Its linear layers are "
                f"{', '.join(sorted(layers))}."
            ) from error


def hold_trainable(model: nn.Module) -> None:
    """Give the process the whole of what is trained, wherever the base's weights lie, and a base
    whose products are not rounded more than its quantisation needs.
    """
    keep_unpacked(model)
    materialise_trainable(model)
    replicate_trainable(model)
    refuse_tensor_parallelism(model)


def widen_trainable(model: nn.Module) -> None:
    """Keep trainable parameters of a 16-bit model in float32, and say so."""
    if names := keep_masters(model):
        logger.warning(
            "%d trainable tensors are kept in float32, as 16 bits would round small updates away "
            "(%s, ...).",
            len(names),
            names[0],
        )


def add_tags(model: nn.Module, tags: Sequence[str]) -> None:
    """Add tags to a model that has a list of them for its card."""
    add: Callable[[Sequence[str]], None] | None = getattr(model, "add_model_tags", None)
    if add is not None:
        add(tags)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and batch-norm updates off inside the context, and restore them after it.

    Quantised layers that round activations in evaluation mode only are in training mode inside.

    Between forwards the outermost module says that it is training, because trainers sort their
    metrics by that.
    """
    training = [module for module in model.modules() if module.training]
    exact = list(filter(rounds_in_evaluation, model.modules()))
    model.eval()
    for module in exact:
        module.training = True

    def say(flag: bool) -> Callable[..., None]:
        return lambda module, *call: setattr(module, "training", flag)

    with ExitStack() as stack:
        if training and training[0] is model:
            before = model.register_forward_pre_hook(say(False), prepend=True)
            after = model.register_forward_hook(say(True), prepend=True, always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
            model.training = True
        try:
            yield
        finally:
            for module in (model, *exact):
                module.training = False
            for module in training:
                module.training = True


def without_cache(model: nn.Module, inputs: Inputs) -> Inputs:
    """Tell a language model to cache no keys and values, unless the batch says otherwise."""
    accepted = inspect.signature(base_of(model).forward).parameters
    if "use_cache" in inputs or "use_cache" not in accepted:
        return inputs
    return {**inputs, "use_cache": False}


def shared_texts(model: nn.Module, inputs: Inputs, clean: bool) -> AbstractContextManager[None]:
    """Return a context in which a model runs texts once per step: see `SuffixPromptModel`.

    With `clean`, the samples also run unperturbed.
    """
    cached = getattr(model, "cached_texts", None)
    return nullcontext() if cached is None else cached(inputs, clean=clean)
