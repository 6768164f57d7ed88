"""Numbers of loss elements of rows, as far as the inputs tell them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..base.batch import Inputs, batch_size

_MOST_FLOATS = 4096  # of a row: images are not counted
ElementCount = Callable[[Inputs], Tensor | None]
"""Returns (R,) numbers of elements, None where these inputs do not tell."""


def element_counts(inputs: Inputs) -> list[ElementCount]:
    """Return candidates for the number of loss elements of a row.

    One for each row; labels that are not ignored (not -100, or not negative), all of them or from
    the second column on, which is what a causal language model predicts; numbers that are not NaN;
    or the sum of an input, such as a mask or a sample weight.
    """
    names = [
        name
        for name, value in sorted(inputs.items(), key=lambda item: "label" not in item[0])
        if torch.is_tensor(value)
        and value.dim() > 0
        and (not value.is_floating_point() or value[:1].numel() <= _MOST_FLOATS)
    ]
    return [_ones, *(partial(_statistic, name, of) for name in names for of in _STATISTICS)]


def _ones(inputs: Inputs) -> Tensor:
    return torch.ones(batch_size(inputs))


def _statistic(name: str, of: Callable[[Tensor], Tensor], inputs: Inputs) -> Tensor | None:
    """Return a statistic (R,) of an input if it can be a number of elements."""
    value = inputs.get(name)
    if not torch.is_tensor(value) or value.dim() == 0:
        return None
    found = of(value).reshape(len(value), -1).double().sum(1).float()
    return found if bool((found.isfinite() & (found >= 0)).all()) else None


def _counted(value: Tensor) -> Tensor:
    return value.isfinite() if value.is_floating_point() else value != -100


def _shifted(value: Tensor) -> Tensor:
    return _counted(value[..., 1:] if value.dim() > 1 else value)


def _not_negative(value: Tensor) -> Tensor:
    return value >= 0


def _itself(value: Tensor) -> Tensor:
    return value


_STATISTICS = (_counted, _shifted, _not_negative, _itself)
