"""The samples of a closed-form head in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from torch import Tensor

from ..base.state import State, tensor, whole
from ..errors import ConfigurationError

Sample: TypeAlias = tuple[Tensor, Tensor, Tensor, int]
"""Inputs (m, H), targets (m, C) and weights (m, C) of a sample's m loss elements, and how many
samples came before it.
"""
_MEANS = ("softmax", "sigmoid", "identity")


def loaded_samples(state: State) -> dict[int, Sample]:
    """Return the samples of a state by their ids.

    Raises:
        ValueError: they are not what a `HeadSolver` has saved.
    """
    if state["mean"] not in _MEANS:
        raise ValueError(f"{state['mean']!r:.50} is none of {_MEANS}")
    ids, sizes = state["ids"].tolist(), state["elements"].tolist()
    width, seen = len(tensor(state["prior"], -1, -1)), whole(state["seen"])
    shapes = {"inputs": -1, "targets": width, "weights": width}
    parts = [tensor(state[name], sum(sizes), of).split(sizes) for name, of in shapes.items()]
    numbers = [whole(number, most=seen) for number in state["numbers"].tolist()]
    return dict(zip(ids, zip(*parts, numbers, strict=True), strict=True))


def check_same_head(
    samples: Iterable[Sample], prior: Tensor, weights: Tensor, features: int
) -> None:
    """Refuse samples (..., H) and a prior (C, D) of another head than that with these weights.

    Raises:
        ConfigurationError: they are.
    """
    inputs = next((first[0] for first in samples), None)
    if prior.shape != weights.shape or (inputs is not None and inputs.shape[1] != features):
        raise ConfigurationError(
            f"The checkpoint's head has weights {tuple(prior.shape)}, this one {features} features "
            f"and weights {tuple(weights.shape)}: resume with the model of the checkpoint's run."
        )
