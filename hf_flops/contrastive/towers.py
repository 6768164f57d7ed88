"""What the first batch decides about a tower: which of its tensors are trained, and how."""

from __future__ import annotations

import logging
from collections.abc import Collection
from copy import copy

import torch
from torch import nn

from ..allocators import Allocator
from ..autotune.first_batch import late_expansion, noise_for
from ..autotune.protocol import RunArguments
from ..base.batch import Inputs, take
from ..base.rounding_error import precision_of
from ..core.method import Method
from ..estimators import ControlVariate, Estimator, find_head
from ..objectives import Forward
from ..perturbations import ParameterVector
from .dual_encoder import used_tensors
from .estimate import Tower, TowerLoss

logger = logging.getLogger("hf_flops.trainer")


def build_tower(
    side: str,
    args: RunArguments,
    model: nn.Module,
    forward: Forward,
    inputs: Inputs,
    frozen: Collection[str],
    *,
    estimator: Estimator,
    allocator: Allocator,
    control: ControlVariate | None,
) -> Tower:
    """Return a tower with its head and its method, as far as the first batch decides them.

    Args:
        side: "image" or "text".
        args: the run's arguments.
        model: the whole model.
        forward: runs the tower.
        inputs: of the tower, rows numbered.
        frozen: names of trainable tensors that stay as they are for now.
        estimator: of the method.
        allocator: of the method.
        control: of the method.
    """
    loss, precision = TowerLoss(side), precision_of(model, autocast=args.bf16)
    trained = set(ParameterVector.of(model).names)
    names = used_tensors(model, forward, take(inputs, torch.tensor([0]))) - set(frozen)
    exact = bool(names) and args.closed_form_head != "none"
    head = find_head(model, loss, forward, inputs, trained - names) if exact else None
    if head is not None:
        names -= set(head.vector.names)
        logger.info(
            "The projection of the %ss gets no noise, because its gradient is exact: %s.",
            side,
            ", ".join(head.vector.names),
        )
    if not names:
        return Tower(forward, None, head)
    perturbation = noise_for(
        args, model, loss.surrogate, forward, inputs, trained - names, precision=precision
    )
    if side == "text" and args.prefix_cache is not None:
        args = copy(args)
        args.prefix_cache = None  # texts have no ids of their own
    reuse = late_expansion(args, model, loss.surrogate, forward, inputs, perturbation, precision)
    method = Method(
        objective=loss,
        perturbation=perturbation,
        estimator=estimator,
        allocator=allocator,
        queries_per_sample=0,
        scale=1e-3,
        rows_per_forward=1,
        reuse=reuse,
        head=head,
        control=control,
        delta_clip=args.delta_clip,
    )
    return Tower(forward, method, head)
