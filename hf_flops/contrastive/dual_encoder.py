"""Models with an image and a text tower: the inputs of each, and checks of a batch."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..base.batch import Inputs, batch_size
from ..base.transfer import to_host
from ..errors import ObjectiveError
from ..objectives import BatchLoss, Forward
from .loss import SIDES, BatchContrast, ContrastiveLoss, DualEncoder, text_keys

logger = logging.getLogger("hf_flops.trainer")


def base_of(model: nn.Module) -> nn.Module:
    """Return the model inside an adapter; a model without one is returned as it is."""
    unwrap: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def contrastive_base(model: nn.Module) -> DualEncoder | None:
    """Return a model, without its adapter, if it has two towers as CLIP and SigLIP; else None."""
    base = base_of(model)
    dual = all(hasattr(base, f"get_{side}_features") for side in SIDES)
    scaled = torch.is_tensor(getattr(base, "logit_scale", None))
    return cast(DualEncoder, base) if dual and scaled else None


def _accepted(base: DualEncoder, side: str) -> tuple[Callable[..., Any], list[str]]:
    """Return the method that runs a tower, and the names of its parameters."""
    method = getattr(base, f"get_{side}_features")
    return method, [
        name for name, p in inspect.signature(method).parameters.items() if p.kind != p.VAR_KEYWORD
    ]


class Scaling:
    """The factor of a model's cosines, and what is added to the scaled ones; read again where they
    are trained or changed.
    """

    def __init__(self, base: DualEncoder) -> None:
        self.base = base
        self._read: tuple[list[tuple[int, int]], tuple[float, float]] | None = None

    def __call__(self) -> tuple[float, float]:
        """Return both numbers."""
        both = self.base.logit_scale, getattr(self.base, "logit_bias", None)
        parts = [part for part in both if part is not None]
        version = [(part.data_ptr(), part._version) for part in parts]
        trained = any(part.requires_grad for part in parts)
        if self._read is None or trained or self._read[0] != version:
            scale, *bias = to_host(*(part.detach() for part in parts))
            numbers = float(scale.double().exp()), float(bias[0]) if bias else 0.0
            self._read = version, numbers
        return self._read[1]


def tower_forward(base: DualEncoder, side: str) -> Forward:
    """Return the function from a tower's inputs to (None, embeddings (R, D), not normalised)."""
    method, names = _accepted(base, side)

    def run(inputs: Inputs) -> tuple[None, Tensor]:
        output = method(**{name: value for name, value in inputs.items() if name in names})
        return None, output if torch.is_tensor(output) else output.pooler_output

    return run


def tower_inputs(base: DualEncoder, inputs: Inputs) -> dict[str, Inputs]:
    """Return the inputs of each tower in a batch.

    Raises:
        ObjectiveError: the batch has no images, or no texts.
    """
    parts: dict[str, Inputs] = {}
    for side in SIDES:
        _, names = _accepted(base, side)
        parts[side] = {name: value for name, value in inputs.items() if name in names}
        if not any(torch.is_tensor(value) for value in parts[side].values()):
            raise ObjectiveError(
                f"The batch has no {side}s: its keys are {sorted(inputs)}, and the model takes "
                f"{', '.join(names)}."
            )
    return parts


def used_tensors(model: nn.Module, forward: Forward, inputs: Inputs) -> set[str]:
    """Return the names of the trainable tensors inside the modules that a forward calls."""
    called: set[int] = set()

    def enter(module: nn.Module, args: object) -> None:
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


def require_return_loss(base: DualEncoder, inputs: Inputs) -> None:
    """Refuse a batch for which a contrastive model would return no loss."""
    flag = inputs.get("return_loss")
    if flag is None or not bool(torch.as_tensor(flag).all()):
        raise ObjectiveError(
            f"The batch asks {type(base).__name__} for no loss: it has no return_loss=True (its "
            f"keys are {sorted(inputs)}). Let the data collator add it, or pass "
            "objective=ContrastiveLoss()."
        )


def whole_batch(
    model: nn.Module, inputs: Inputs, contrast: ContrastiveLoss | None
) -> BatchLoss | BatchContrast:
    """Return the loss of a batch as a whole; without `contrast` it is the model's own.

    Raises:
        ObjectiveError: the batch asks for no loss, lacks images or texts, or does not pair them as
            the loss does.
    """
    base = contrastive_base(model)
    assert base is not None
    images, texts = (batch_size(part) for part in tower_inputs(base, inputs).values())
    (contrast or ContrastiveLoss()).pairing(inputs, texts, images)
    if contrast is not None:
        return BatchContrast(contrast, base)
    if "labels" in inputs:
        raise ObjectiveError(
            "The model's own loss ignores the batch's labels: pass objective=ContrastiveLoss()."
        )
    require_return_loss(base, inputs)
    if warning := same_texts(inputs):
        logger.warning("%s", warning)
    return BatchLoss()


def with_plain_flag(inputs: Inputs) -> Inputs:
    """Make return_loss one truth value if a collator made it a tensor, one for each sample."""
    flag = inputs.get("return_loss")
    return {**inputs, "return_loss": bool(flag.all())} if torch.is_tensor(flag) else inputs


def same_texts(inputs: Inputs) -> str | None:
    """Return a warning if texts of a batch are equal: the loss treats them as wrong pairs."""
    tokens = inputs.get("input_ids")
    if not torch.is_tensor(tokens) or tokens.dim() != 2:
        return None
    extra = len(tokens) - len(torch.unique(text_keys(inputs), dim=0))
    if not extra:
        return None
    return (
        f"{extra} of the {len(tokens)} texts of a batch equal an earlier one, and the loss treats "
        "each as wrong for the other's image: objective=ContrastiveLoss("
        'same_texts="positives") treats equal texts as one.'
    )
