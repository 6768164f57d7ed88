"""Checks that a base model is the one of a logged run."""

from __future__ import annotations

import logging
from pathlib import Path

from safetensors import SafetensorError

from ..base.state import State
from ..errors import TrajectoryError, in_one_line
from .limits import dtype, refused
from .start import digests


def check_base(says: State, base: str | Path) -> int:
    """Load a base model and compare its tensors with those of the run; return their number.

    Args:
        says: metadata of the log's first record.
        base: a folder or an id of the Hub.

    Raises:
        TrajectoryError: it cannot be loaded, is another model, or is not one of transformers.
    """
    import transformers

    wanted = says["base"]
    with refused("The log", "the description of its base"):
        kind = getattr(transformers, wanted["class"], None)
        wanted["digests"].items()
        dtype(wanted["dtype"])
    # a log may name anything, but only a model is called
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise TrajectoryError(
            f"The run's base is a {wanted['class']!r:.80}, which transformers cannot load: leave "
            "--base out."
        )
    verbosity, _ = transformers.logging.get_verbosity(), transformers.logging.set_verbosity_error()
    try:  # a head may have another size there: it is not of the base if it was trained
        model = kind.from_pretrained(str(base), dtype=wanted["dtype"], ignore_mismatched_sizes=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise TrajectoryError(
            f"The base {base} cannot be loaded as a {wanted['class']}: {in_one_line(error)}."
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    model.requires_grad_(False)
    known = set(digests(model).values())
    other = [name for name, digest in wanted["digests"].items() if digest not in known]
    if other:
        raise TrajectoryError(
            f"{base} is not the base of the run ({wanted['name'] or wanted['class']}): "
            f"{len(other)} of {len(wanted['digests'])} tensors differ, {other[0]} among them."
        )
    logging.getLogger(__name__).info(
        "The base is the one of the run: %d tensors are the same.", len(wanted["digests"])
    )
    return len(wanted["digests"])
