"""Which row of the data a failure comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import FlopsError, ObjectiveError

LABELS = ("labels", "label", "label_ids")
MOST = 10_000  # rows that are looked at
_MAY_BE_A_ROW = (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError)


@contextmanager
def rows_blamed(data: object, model: nn.Module) -> Iterator[None]:
    """Name the row of a data set that lacks what others have, if that can be why training fails.

    Args:
        data: what is trained on.
        model: tells how many classes there are.

    Raises:
        ObjectiveError: training has failed, and a row has a gap, another shape, or a label that is
            text or none of the classes.
    """
    try:
        yield
    except _MAY_BE_A_ROW as error:
        # other errors of ours have a reason of their own
        known = isinstance(error, FlopsError) and not isinstance(error, ObjectiveError)
        reason = None if known else complaint(data, model, error)
        if reason is None:
            raise
        raise ObjectiveError(reason) from error


def complaint(data: object, model: nn.Module, error: Exception) -> str | None:
    """Return what is wrong with a row, in one sentence, or None.

    Examples:
        >>> rows = [{"x": 1, "labels": 0}, {"x": 2, "labels": None}]
        >>> complaint(rows, nn.Identity(), KeyError("labels"))
        "Row 1 of train_dataset has no 'labels', but other rows do: fill it in, or drop the row."
    """
    if not isinstance(data, Sized) or not hasattr(data, "__getitem__"):
        return None
    rows = [data[i] for i in range(min(len(data), MOST))]
    if not all(isinstance(row, Mapping) for row in rows):
        return None
    found = _gap(rows) or _text_label(rows)
    if found is None and "equal size" in str(error):
        return _other_shape(rows)
    if found is None and "out of bounds" in str(error):
        return _other_class(rows, getattr(getattr(model, "config", None), "num_labels", None))
    return found


def _gap(rows: list[Any]) -> str | None:
    names = {name: None for row in rows for name, value in row.items() if value is not None}
    for i, row in enumerate(rows):
        for name in names:
            if row.get(name) is None:
                return (
                    f"Row {i} of train_dataset has no {name!r}, but other rows do: fill it in, or "
                    "drop the row."
                )
    return None


def _text_label(rows: list[Any]) -> str | None:
    for i, row in enumerate(rows):
        for name in LABELS:
            if isinstance(row.get(name), str):
                return (
                    f"{name!r} of train_dataset is text ({row[name]!r} in row {i}): map each class "
                    "to a whole number, 0, 1, and so on."
                )
    return None


def _other_shape(rows: list[Any]) -> str | None:
    for i, row in enumerate(rows):
        for name, value in row.items():
            first, shape = (tuple(getattr(v, "shape", ())) for v in (rows[0][name], value))
            if first != shape:
                return (
                    f"Row {i} of train_dataset: {name!r} has shape {shape}, but {first} in row 0: "
                    "give all rows one shape, or use a collator that pads."
                )
    return None


def _other_class(rows: list[Any], classes: int | None) -> str | None:
    for i, row in enumerate(rows):
        for name in LABELS:
            value = row.get(name)
            if classes is None or value is None or torch.as_tensor(value).dim() > 0:
                continue
            if not (0 <= int(value) < classes or int(value) == -100):
                return (
                    f"Row {i} of train_dataset: {name!r} is {int(value)}, but the model has "
                    f"{classes} classes, numbered from 0: load it with num_labels=."
                )
    return None
