"""Models of images and texts: their two towers, what of a batch each takes, and what is wrong with
a batch.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..base.batch import batch_size
from ..errors import ObjectiveError
from ..objectives import BatchLoss, Forward
from .loss import SIDES, BatchContrast, ContrastiveLoss, text_keys

logger = logging.getLogger("hf_flops.trainer")


def contrastive_base(model: nn.Module) -> Any:
    """Return the model of two towers, as CLIP's and SigLIP's are, that is or is inside a model;
    None if there is none.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    towers = all(hasattr(base, f"get_{side}_features") for side in SIDES)
    return base if towers and torch.is_tensor(getattr(base, "logit_scale", None)) else None


def _accepted(base: Any, side: str) -> tuple[Callable[..., Any], list[str]]:
    """Return what runs a tower, and the names that it takes."""
    method = getattr(base, f"get_{side}_features")
    return method, [
        name for name, p in inspect.signature(method).parameters.items() if p.kind != p.VAR_KEYWORD
    ]


def tower_forward(base: Any, side: str) -> Forward:
    """Return what maps a tower's inputs of R rows to (None, embeddings (R, D), not normalised)."""
    method, names = _accepted(base, side)

    def run(inputs: Mapping[str, Any]) -> tuple[None, Tensor]:
        found = method(**{name: value for name, value in inputs.items() if name in names})
        return None, found if torch.is_tensor(found) else found.pooler_output

    return run


def tower_inputs(base: Any, inputs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what of a batch is for each tower.

    Raises:
        ObjectiveError: the batch has no images, or no texts.
    """
    parts = {}
    for side in SIDES:
        _, names = _accepted(base, side)
        parts[side] = {name: value for name, value in inputs.items() if name in names}
        if not any(torch.is_tensor(value) for value in parts[side].values()):
            raise ObjectiveError(
                f"The batch has no {side}s: its keys are {sorted(inputs)}, and the model takes "
                f"{', '.join(names)}."
            )
    return parts


def used_tensors(model: nn.Module, forward: Forward, inputs: Mapping[str, Any]) -> set[str]:
    """Return the names of the trainable tensors inside the modules that a forward calls."""
    called: set[int] = set()

    def enter(module: nn.Module, args: Any) -> None:
        called.update(map(id, module.parameters()))

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(enter).remove)
        forward(inputs)
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) in called
    }


def require_return_loss(base: Any, inputs: Mapping[str, Any]) -> None:
    """Refuse a batch for which a contrastive model would return no loss."""
    flag = inputs.get("return_loss")
    if flag is None or not bool(torch.as_tensor(flag).all()):
        raise ObjectiveError(
            f"The batch asks {type(base).__name__} for no loss: it has no return_loss=True (its "
            f"keys are {sorted(inputs)}), so let the data collator add it, or give "
            "objective=ContrastiveLoss()."
        )


def whole_batch(
    model: nn.Module, inputs: Mapping[str, Any], contrast: ContrastiveLoss | None
) -> BatchLoss | BatchContrast:
    """Return the loss of a batch as a whole, for noise that all of it shares; None stands for the
    model's own loss.

    Raises:
        ObjectiveError: the batch asks for no loss, lacks images or texts, or does not pair them as
            the loss does.
    """
    base = contrastive_base(model)
    images, texts = (batch_size(part) for part in tower_inputs(base, inputs).values())
    (contrast or ContrastiveLoss()).pairing(inputs, texts, images)
    if contrast is not None:
        return BatchContrast(contrast, base)
    if "labels" in inputs:
        raise ObjectiveError(
            "The batch's labels say nothing to the model's own loss: give "
            "objective=ContrastiveLoss()."
        )
    require_return_loss(base, inputs)
    if warning := same_texts(inputs):
        logger.warning("%s", warning)
    return BatchLoss()


def with_plain_flag(inputs: dict[str, Any]) -> dict[str, Any]:
    """Make return_loss one truth value, where a collator made a tensor of the samples' ones."""
    flag = inputs.get("return_loss")
    return {**inputs, "return_loss": bool(flag.all())} if torch.is_tensor(flag) else inputs


def same_texts(inputs: Mapping[str, Any]) -> str | None:
    """Say how many texts of a batch equal an earlier one, if any do: each counts as wrong for the
    other's image.
    """
    tokens = inputs.get("input_ids")
    if not torch.is_tensor(tokens) or tokens.dim() != 2:
        return None
    extra = len(tokens) - len(torch.unique(text_keys(inputs), dim=0))
    if not extra:
        return None
    return (
        f"{extra} of the {len(tokens)} texts of a batch equal an earlier one, and the loss takes "
        'each for wrong for the other\'s image: objective=ContrastiveLoss(same_texts="positives") '
        "takes equal texts for one."
    )
