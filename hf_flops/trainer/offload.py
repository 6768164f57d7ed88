"""Models whose weights accelerate keeps on the CPU or on disk: the base stays where it is, and what
is trained lies where the model computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, cast

from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from accelerate.utils import align_module_device
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from peft import PeftConfig


def offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """Return accelerate's hook that fetches a module's weights for each forward, or None."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return next((h for h in hooks if isinstance(h, AlignDevicesHook) and h.offload), None)


def is_offloaded(model: nn.Module) -> bool:
    """Return whether weights of a model are fetched for each forward."""
    return any(offload_hook(module) for module in model.modules())


@contextmanager
def weights_at_hand(config: PeftConfig) -> Iterator[None]:
    """Let PEFT see the weights of the layers that it puts adapters on, inside the context.

    It puts an adapter on the device of the weights, which is `meta` while they are offloaded, and
    some adapters start from the weights' values.

    Raises:
        ConfigurationError: an adapter's initialisation changes the weights.
    """
    tuner = cast(Any, PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(config.peft_type)))
    if not hasattr(tuner, "_create_and_replace"):  # prompts are not put on layers
        yield
        return
    inherited, original = "_create_and_replace" not in vars(tuner), tuner._create_and_replace

    @wraps(original)
    def create(
        self: object, config: object, name: str, target: nn.Module, *rest: object, **more: object
    ) -> object:
        with align_module_device(target):
            weights = {n: (p.data_ptr(), p._version) for n, p in target.named_parameters()}
            made = original(self, config, name, target, *rest, **more)
            after = {n: (p.data_ptr(), p._version) for n, p in target.named_parameters()}
        if weights != after and offload_hook(target) is not None:
            raise ConfigurationError(
                "This adapter's initialisation changes the weights underneath, which are "
                "offloaded: initialise it in memory, save both, and load them."
            )
        return made

    tuner._create_and_replace = create
    try:
        yield
    finally:
        if inherited:
            del tuner._create_and_replace
        else:
            tuner._create_and_replace = original


def materialise_trainable(model: nn.Module) -> None:
    """Take trainable tensors out of offloading, onto the device that computes.

    Layers of PEFT have the weights underneath at hand for their whole forward from then on: some
    read them beside that layer's forward.

    Raises:
        ConfigurationError: a trainable tensor has lost its values.
    """
    for module in list(model.modules()):
        own = list(module.parameters(recurse=False))
        hook = offload_hook(module)
        if hook is not None and any(parameter.requires_grad for parameter in own):
            _bring(module, hook)
    lost = [n for n, p in model.named_parameters() if p.requires_grad and p.device.type == "meta"]
    if lost:
        raise ConfigurationError(
            f"{len(lost)} trainable tensors have no values ({lost[0]}, ...): PEFT loses them when "
            "it puts an adapter on weights that are offloaded. Give the plain model and "
            "peft_config=, or put the adapter on before the model is offloaded."
        )
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            _hold_base(module.get_base_layer(), module)


def _bring(module: nn.Module, hook: AlignDevicesHook) -> None:
    """Give a module its tensors for good."""
    hook.pre_forward(module)
    owned = dict(module.named_parameters(recurse=False))
    remove_hook_from_module(module)
    for name, parameter in owned.items():
        # a copy: the values may be a file's, mapped into memory
        parameter.data = parameter.data.clone()
        module.register_parameter(name, parameter)


def _hold_base(base: Any, layer: nn.Module) -> None:
    """Fetch the weights of a base layer when the layer around it begins, and drop them at its
    end.
    """
    hook = offload_hook(base)
    if hook is None or hook is not base._hf_hook:
        return
    base.forward = base._old_forward
    del base._old_forward
    layer.register_forward_pre_hook(partial(_fetch, hook, base), with_kwargs=True)
    layer.register_forward_hook(partial(_drop, hook, base), always_call=True)


def _fetch(hook: Any, base: nn.Module, layer: nn.Module, args: tuple, kwargs: dict) -> Any:
    return hook.pre_forward(base, *args, **kwargs)


def _drop(hook: Any, base: nn.Module, layer: nn.Module, args: tuple, output: object) -> Any:
    return hook.post_forward(base, output)


@contextmanager
def device_map_hidden(model: nn.Module) -> Iterator[None]:
    """Hide a model's device map inside the context.

    accelerate refuses to train a model with a map in several processes, or a quantised one that is
    offloaded, because of the backward pass; PEFT maps the model again when it loads an adapter.
    """
    hidden = {
        m: vars(m).pop("hf_device_map") for m in model.modules() if "hf_device_map" in vars(m)
    }
    try:
        yield
    finally:
        for module, device_map in hidden.items():
            module.hf_device_map = device_map
