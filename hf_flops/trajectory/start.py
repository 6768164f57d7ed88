"""The start of a run: the adapter's initial values, its files, and digests of its base model."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..base.state import State, raw_bytes


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name, in the model's order."""
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def describe(model: nn.Module) -> tuple[State, dict[str, Tensor]]:
    """Return metadata and tensors of a model for the first record; zero tensors are not stored."""
    trained, base = trainable(model), getattr(model, "get_base_model", lambda: model)()
    config, files, others = _files(model, trained)
    values: dict[str, Tensor] = {
        **trained,
        **{f"file:{name}": tensor for name, tensor in others.items()},
    }
    zero = [name for name, tensor in values.items() if not bool(tensor.detach().any())]
    kinds = {
        name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for name, tensor in values.items()
    }
    shared = {tensor.untyped_storage().data_ptr() for tensor in others.values()}
    says = {
        "version": __version__,
        "tensors": kinds,
        "zero": zero,
        "trainable": list(trained),
        "adapter": None if files is None else {"config": config, "files": files},
        "base": {
            "class": type(base).__name__,
            "name": getattr(getattr(base, "config", None), "name_or_path", ""),
            "dtype": str(getattr(base, "dtype", torch.float32)).removeprefix("torch."),
            "digests": digests(model, shared),
        },
    }
    return says, {name: tensor for name, tensor in values.items() if name not in zero}


def _files(
    model: Any, trained: Mapping[str, nn.Parameter]
) -> tuple[State, dict[str, str] | None, dict[str, Tensor]]:
    """Return PEFT's configuration, the parameter of each saved tensor (or ""), and the others.

    The second is None if the model has no adapter, or saves other tensors than its parameters.
    """
    if not hasattr(model, "peft_config"):
        return {}, None, {}
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    names = {parameter.data_ptr(): name for name, parameter in trained.items()}
    files = {key: names.get(tensor.data_ptr(), "") for key, tensor in state.items()}
    # tensors that are saved as copies, as prompts are
    for name in sorted(set(trained) - set(files.values())):
        alike = [
            key
            for key, taken in files.items()
            if not taken and torch.equal(state[key], trained[name])
        ]
        if len(alike) != 1:
            return {}, None, {}
        files[alike[0]] = name
    config = copy.copy(model.peft_config[model.active_adapter])
    config.inference_mode = True
    settings = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }
    if config.task_type is None:  # as PEFT does, for loading without a class
        base = type(model.get_base_model())
        settings["auto_mapping"] = {
            "base_model_class": base.__name__,
            "parent_library": base.__module__,
        }
    return settings, files, {key: state[key] for key, name in files.items() if not name}


def digests(model: nn.Module, without: Iterable[int] = ()) -> dict[str, str]:
    """Return a digest of each frozen tensor of a model's base by its name in the base.

    Args:
        model: the model; tensors that an adapter replaced are left out.
        without: addresses of tensors that belong to the adapter.
    """
    result, left_out = {}, set(without)
    for name, parameter in model.named_parameters():
        if not (
            parameter.requires_grad
            or ".original_module." in name
            or parameter.untyped_storage().data_ptr() in left_out
        ):
            if hasattr(model, "peft_config"):
                name = name.removeprefix("base_model.").removeprefix("model.")
            result[name.replace(".base_layer.", ".")] = digest(parameter)
    return result


def digest(tensor: Tensor) -> str:
    """Return the first 64 bits of the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()[:16]
