"""What a run may do whose trajectory is logged: only what is a number per query can be replayed
from the log.
"""

from __future__ import annotations

import logging
from typing import Any

from ..errors import ConfigurationError

logger = logging.getLogger(__name__)


def replayable(args: Any) -> dict[str, Any]:
    """Return the defaults that a logged run has in place of the preset's: what is not a number per
    query is off.

    Raises:
        ConfigurationError: an option that was asked for cannot be replayed from the log.
    """
    off = {"closed_form_head": False, "control_variate": "none"}
    why = {
        "closed_form_head": "its gradient is dense",
        "control_variate": "its predictions are dense",
    }
    for name, value in off.items():
        if getattr(args, name) not in (None, value):
            raise ConfigurationError(
                f"{name}={getattr(args, name)!r} cannot be replayed from a trajectory log "
                f"({why[name]}, not a number per query): leave it out, set {name}={value!r}, or "
                "switch trajectory_log off."
            )
    if args.perturbation == "activation":
        raise ConfigurationError(
            'perturbation="activation" cannot be replayed from a trajectory log, because its noise '
            'is not known without a forward pass: use "auto", "rowwise" or "shared", or switch '
            "trajectory_log off."
        )
    unset = [name for name in off if getattr(args, name) is None]
    if unset:
        logger.warning(
            "trajectory_log switches off what is not a number per query: %s.", ", ".join(unset)
        )
    return off
