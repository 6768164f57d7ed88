"""Batches that are not laid out one entry per sample: pairs, packed texts, patches of images."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import Trainer

from ..base.batch import Inputs, batch_size
from ..base.calls import replaced_calls
from ..base.patching import Call


@dataclass(frozen=True)
class Pairs:
    """Batches whose second half belongs to the samples of the first, as chosen and rejected texts
    do in TRL.

    Attributes:
        names: of the inputs with two entries per sample.
    """

    names: frozenset[str]

    @classmethod
    def of(cls, inputs: Inputs, samples: int) -> Pairs | None:
        """Return the layout of a batch of so many samples, if it has two entries for each."""
        if batch_size(inputs) != 2 * samples:
            return None
        return cls(
            frozenset(
                name
                for name, value in inputs.items()
                if torch.is_tensor(value) and value.dim() > 0 and len(value) == 2 * samples
            )
        )

    def by_sample(self, inputs: Inputs) -> dict[str, Any]:
        """Return inputs of (B, 2, ...) for (2 B, ...)."""
        return {
            name: value.unflatten(0, (2, -1)).transpose(0, 1).contiguous()
            if name in self.names
            else value
            for name, value in inputs.items()
        }

    def restored(self, inputs: Inputs) -> dict[str, Any]:
        """Return inputs of (2 R, ...) for (R, 2, ...)."""
        return {
            name: value.transpose(0, 1).flatten(0, 1) if name in self.names else value
            for name, value in inputs.items()
        }


class Layout:
    """How the batches of a run are laid out, which the first one shows.

    Attributes:
        pairs: of samples; None if they have one entry each.
    """

    def __init__(self) -> None:
        self.pairs: Pairs | None = None
        self._known = False

    def by_sample(self, trainer: Trainer, inputs: Inputs) -> Inputs:
        """Return a batch with one entry per sample."""
        if is_packed(inputs):
            return unpacked(inputs)
        inputs = with_own_patches(inputs)
        if not self._known:
            samples = trainer._train_batch_size
            if not trainer.accelerator.split_batches:
                samples *= trainer.args.world_size
            if isinstance(trainer.train_dataset, Sized):
                samples = min(samples, len(trainer.train_dataset))
            self.pairs, self._known = Pairs.of(inputs, samples), True
        return inputs if self.pairs is None else self.pairs.by_sample(inputs)

    def restored(self, inputs: Inputs) -> dict[str, Any]:
        """Return a batch as the model and its loss expect it."""
        given = dict(inputs) if self.pairs is None else self.pairs.restored(inputs)
        for name in given.keys() & _WITH_PATCHES:
            if isinstance(given[name], list):
                given[name] = torch.cat(given[name])
                if not len(given[name]):  # the model would look for images
                    del given[name]
        return given


def with_own_patches(inputs: Inputs) -> Inputs:
    """Return inputs with a list of each sample's patches, and one of the sizes of its images, where
    a batch has the patches of all images one after the other, as in Qwen-VL.

    An image belongs to the sample that has its tokens. Where tokens and patches do not tell, the
    inputs are returned as they are.
    """
    found, kinds = dict(inputs), inputs.get("mm_token_type_ids")
    if not torch.is_tensor(kinds):
        return inputs
    for kind, (patches, grids) in _PATCHES.items():
        values, sizes = inputs.get(patches), inputs.get(grids)
        if not (torch.is_tensor(values) and torch.is_tensor(sizes)):
            continue
        own, tokens = sizes.prod(1).cpu(), (kinds == kind).sum(1).cpu()
        ends = (tokens.cumsum(0) * own.sum()) // tokens.sum().clamp(min=1)
        sample = torch.searchsorted(ends, own.cumsum(0)).clamp(max=len(tokens) - 1)
        counts = torch.zeros_like(tokens).index_add_(0, sample, own)
        if int(own.sum()) != len(values) or not torch.equal(counts.cumsum(0), ends):
            return inputs
        images = torch.bincount(sample, minlength=len(tokens))
        found[patches] = list(values.split(counts.tolist()))
        found[grids] = list(sizes.split(images.tolist()))
    return found


# what `mm_token_type_ids` says of images and of videos: their patches, and their sizes
_PATCHES = {
    1: ("pixel_values", "image_grid_thw"),
    2: ("pixel_values_videos", "video_grid_thw"),
}
_WITH_PATCHES = {name for names in _PATCHES.values() for name in names}


@contextmanager
def rows_together(modules: Collection[nn.Module], rows: int) -> Iterator[None]:
    """Let modules that are called with several texts of each row, all first ones before all second
    ones, see those of a row one after the other, as noise per row needs; outputs are put back.
    """

    def call(module: nn.Module, original: Call, *args: object, **kwargs: object) -> object:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if has_rows(leaf)]
        entries = len(given[0]) // rows if given else 1
        if entries < 2 or {len(leaf) for leaf in given} != {entries * rows}:
            return original(*args, **kwargs)
        args, kwargs = tree_map(partial(_reordered, entries, rows), (args, kwargs))
        return tree_map(partial(_reordered, rows, entries), original(*args, **kwargs))

    with replaced_calls(modules, call):
        yield


def has_rows(value: object) -> bool:
    """Return whether something is a tensor with a first dimension."""
    return torch.is_tensor(value) and value.dim() > 0


def _reordered(outer: int, inner: int, value: object) -> object:
    """Exchange the two dimensions that the first one of a tensor consists of."""
    if not torch.is_tensor(value) or value.dim() == 0 or len(value) != outer * inner:
        return value
    return value.unflatten(0, (outer, inner)).transpose(0, 1).flatten(0, 1)


def is_packed(inputs: Inputs) -> bool:
    """Return whether rows of a batch consist of several texts, whose positions start at 0."""
    positions, tokens = inputs.get("position_ids"), inputs.get("input_ids")
    mask = inputs.get("attention_mask")
    return (
        torch.is_tensor(positions)
        and torch.is_tensor(tokens)
        and positions.shape == tokens.shape
        and (mask is None or (mask.shape == tokens.shape and bool(mask.all())))
        and int((positions == 0).sum()) > len(positions)
    )


def unpacked(inputs: Inputs) -> dict[str, Any]:
    """Return a packed batch with one text in each row, padded at the right.

    Each text is a sample then, with queries of its own.
    """
    positions: Tensor = inputs["position_ids"]
    starts = torch.nonzero(positions.flatten() == 0).flatten().tolist()
    lengths = [b - a for a, b in zip(starts, [*starts[1:], positions.numel()], strict=True)]
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        if torch.is_tensor(value) and value.shape[:2] == positions.shape:
            fill = -100 if "labels" in name else 0
            texts = value.flatten(0, 1).split(lengths)
            found[name] = nn.utils.rnn.pad_sequence(texts, True, fill)
        elif not name.startswith(_PACKED):
            found[name] = value
    columns = torch.arange(max(lengths), device=positions.device)
    own = torch.tensor(lengths, device=positions.device)[:, None]
    return {**found, "attention_mask": (columns < own).long()}


_PACKED = ("cu_seq_lens", "max_length_", "seq_idx", "attention_mask")
