"""The choice of a run's gradient session: contrastive, or of the losses of samples."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..allocators import Allocator
from ..autotune.protocol import Batch, GradientSession, RunArguments
from ..autotune.session import SampleSession
from ..distributed.collectives import ProcessGroup
from ..errors import ConfigurationError
from ..estimators import Estimator
from ..objectives import Forward, Objective
from ..perturbations import Perturbation
from .dual_encoder import contrastive_base, whole_batch
from .loss import ContrastiveLoss
from .session import ContrastiveSession


def start_session(
    args: RunArguments,
    model: nn.Module,
    group: ProcessGroup,
    metered: Callable[[Forward], Forward],
    *,
    objective: Objective | None = None,
    allocator: Allocator | None = None,
    estimator: Estimator | None = None,
    perturbation: Perturbation | None = None,
    whole: bool = False,
    check: Callable[[Batch], None] = lambda batch: None,
) -> GradientSession:
    """Return the session for a model, an objective and arguments.

    Args:
        args: the run's arguments.
        model: the model.
        group: the processes of the run.
        metered: wraps a forward to count its rows.
        objective: what is minimised; None for the model's own loss.
        allocator: an instance, in place of the name in `args`.
        estimator: an instance, in place of the name in `args`.
        perturbation: an instance, in place of the name in `args`.
        whole: whether a contrastive loss is perturbed as one loss of the batch.
        check: refuses a first batch that lacks what the model's own loss needs.

    Raises:
        ConfigurationError: arguments that queries of single images and texts cannot follow.
    """
    contrast = objective if isinstance(objective, ContrastiveLoss) else None
    contrastive = contrastive_base(model) is not None and (
        objective is None or contrast is not None
    )
    if contrastive and not (whole or perturbation or args.perturbation == "shared"):
        _check_contrastive(args)
        return ContrastiveSession(
            args, model, contrast, metered, allocator=allocator, estimator=estimator
        )

    def default(batch: Batch) -> Objective | None:
        if contrastive:
            return whole_batch(model, batch.inputs, contrast)
        if objective is None:
            check(batch)
        return None

    return SampleSession(
        args,
        model,
        group,
        objective=objective,
        allocator=allocator,
        estimator=estimator,
        perturbation=perturbation,
        default=default,
    )


def _check_contrastive(args: RunArguments) -> None:
    """Refuse arguments that need a loss per batch."""
    for refused, message in (
        (
            args.trajectory_log,
            "trajectory_log=True does not distinguish queries of images from those of texts: use "
            'perturbation="shared".',
        ),
        (
            args.queries_per_sample == "auto",
            "queries_per_sample='auto' does not support rows of images and texts: give a number.",
        ),
        (
            args.world_size > 1,
            f"{args.world_size} processes cannot share the queries of single images and texts: "
            'use one, or perturbation="shared".',
        ),
        (
            args.learning_rate_search,
            "learning_rate_search needs a loss per batch, not queries of single images and texts: "
            'give learning_rate a number, or use perturbation="shared".',
        ),
    ):
        if refused:
            raise ConfigurationError(message)
