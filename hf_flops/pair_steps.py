"""Whether a run follows a contrastive loss, and then embedding by embedding or for the batch as a whole."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from .alignment import Alignment
from .contrastive import ContrastiveLoss
from .errors import ConfigurationError
from .image_text import contrastive_base, whole_batch
from .objectives import Forward, Objective

logger = logging.getLogger("hf_flops.trainer")


class PairSteps:
    """What a trainer does otherwise for models of images and texts.

    Args:
        objective: the trainer's, None for the model's own loss.
    """

    def __init__(self, objective: Any) -> None:
        self.contrast = objective if isinstance(objective, ContrastiveLoss) else None
        self._theirs = objective is not None and self.contrast is None  # another objective has nothing to do with it
        self.reset()

    def reset(self) -> None:
        """Start anew, with a new run."""
        self._alignment: Alignment | None = None
        self._refused = False

    def renew(self) -> None:
        """Find out anew, with the next batch, what of each tower is trained."""
        if self._alignment is not None:
            self._alignment.stale = True

    def alignment(self, trainer: Any) -> Alignment | None:
        """Return what estimates gradients from single images and texts; None for other losses and for shared noise."""
        whole = trainer.args.perturbation == "shared" or trainer._given_perturbation or trainer.compute_loss_func
        possible = not (self._theirs or self._refused or whole) and contrastive_base(trainer.model) is not None
        if self._alignment is None and possible:
            parts = trainer._estimator, trainer._given_allocator, lambda forward: trainer.ledger.metered(forward)
            self._alignment = Alignment(trainer.args, trainer.model, self.contrast or ContrastiveLoss(), *parts)
        return self._alignment

    def ready(self, trainer: Any, forward: Forward, inputs: Mapping[str, Any]) -> Alignment | None:
        """Return the same, set up with the batch where that is due; None, with a message, where the loss is another one."""
        alignment = self.alignment(trainer)
        if alignment is not None and trainer._recorder is not None:
            raise ConfigurationError(
                'trajectory_log=True cannot tell queries of images from those of texts: use perturbation="shared".'
            )
        if alignment is not None and trainer.args.queries_per_sample == "auto":
            raise ConfigurationError("queries_per_sample='auto' does not know the rows of images and texts: give a number.")
        if alignment is not None and trainer.args.world_size > 1:
            raise ConfigurationError(
                f"{trainer.args.world_size} processes cannot share the queries of single images and texts: use one, or "
                'perturbation="shared".'
            )
        if alignment is not None and not alignment.set_up(forward, inputs, trainer._held, own=self.contrast is None):
            logger.warning("The loss of %s is not that of its embeddings' cosines.", type(alignment.base).__name__)
            self._alignment, self._refused = None, True
        return self._alignment

    def whole(self, trainer: Any, inputs: Mapping[str, Any]) -> Objective | None:
        """Return the contrastive loss of a batch as a whole, after a look at it; None for models and objectives without."""
        if self._theirs or contrastive_base(trainer.model) is None:
            return None
        return whole_batch(trainer.model, inputs, self.contrast)
