"""How the processes of a run come to the same update: alone, by summing gradients, or by telling
each other scalars.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..base.padding import TrimmedBatch
from ..base.rows import BatchPosition, Rows
from ..errors import ConfigurationError
from ..objectives import RowLosses
from ..perturbations import Perturbation
from ..perturbations.replay import UpdateRecord
from .collectives import ProcessGroup
from .noise_sum import NoiseSum, RegeneratedSum


class Exchange:
    """What processes share of a step: its samples and rows evenly, its numbers all, and in the end
    its update.

    All processes hold the whole batch. Rows are cut into even pieces by number, whatever samples
    they repeat. Losses and deltas are gathered, so that every process decides by the same numbers.
    How the update is made is a subclass's.

    Args:
        group: the other processes.

    Attributes:
        pending: whether batches of the optimizer step have been put off.
    """

    pending = False

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group or ProcessGroup()

    def check(self, *, control: bool, replays: bool) -> None:
        """Refuse what this exchange cannot do.

        Args:
            control: whether there is a control variate.
            replays: whether noise can only be pulled back after a forward under it.
        """

    def clean_pieces(self, samples: int, *, head: bool) -> list[slice]:
        """Say which samples each process runs unperturbed; a single piece: every process runs all.

        Args:
            samples: B.
            head: whether the closed-form head's gradient comes from them.
        """
        del head
        return self.group.partition(samples, 2) if samples >= 4 else [slice(0, samples)]

    def counts_exact(self, pieces: Sequence[slice]) -> bool:
        """Say whether this process adds its samples' exact gradient, where they have been run in
        these pieces.
        """
        del pieces
        return True

    def parts(
        self, rows: Rows, feed: TrimmedBatch, *, shares_noise: bool, chunk: int | None = None
    ) -> list[Rows]:
        """Cut rows into the pieces of all processes, each in the order in which it goes through the
        model.

        Rows of a sample stay together where noise is per row, so that what runs once per sample
        runs in few processes; where noise is shared those of a group do, so that forwards stay
        large. Whole chunks are dealt out where there are enough to be fair, because then what a
        forward is given, and so its rounding, does not depend on the number of processes.

        Args:
            rows: of all processes.
            feed: knows which rows have padding.
            shares_noise: whether noise is shared.
            chunk: rows that go through the model at a time, if that is fixed.
        """
        world, chunks = self.group.world, -(-len(rows) // chunk) if chunk else 0
        rows = rows if shares_noise else rows.sorted()
        fair = chunks >= world and (chunks % world == 0 or chunks >= 4 * world)
        if shares_noise or not fair:
            return [
                feed.ordered(rows[own], within_groups=shares_noise)
                for own in self.group.partition(len(rows))
            ]
        ordered = feed.ordered(rows, within_groups=False)
        dealt: list[list[Tensor]] = [[] for _ in range(world)]
        for number, index in enumerate(torch.arange(len(rows)).tensor_split(chunks)):
            # 0, 1, 2, 2, 1, 0, 0, ...: the first chunks have the widest rows
            turn = number % (2 * world)
            dealt[min(turn, 2 * world - 1 - turn)].append(index)
        return [ordered[torch.cat(own)] for own in dealt]

    def gathered(self, parts: Sequence[Rows], own: Tensor) -> tuple[Rows, Tensor, Tensor]:
        """Put the rows of all processes together, in an order that does not depend on their number.

        Args:
            parts: the rows of each process.
            own: (r, C) what this one found for each of its rows.

        Returns:
            All rows, (R, C) what was found for them, and (R,) whether they are this process's own.
        """
        sizes = [len(part) for part in parts]
        found, rows = self.group.all_gather(own, sizes), parts[0]
        for part in parts[1:]:
            rows = rows.then(part)
        mine = (
            torch.repeat_interleave(torch.arange(self.group.world), torch.tensor(sizes))
            == self.group.rank
        )
        order = rows.order()
        return rows[order], found[order], mine[order]

    def losses(self, own: RowLosses, sizes: Sequence[int], *, logits: bool) -> RowLosses:
        """Put the clean losses of all processes together; logits and slopes only if they are
        wanted.
        """
        names = ["sums", "counts", "residuals"] + ["logits", "slopes"] * logits
        found = {name: values for name in names if (values := getattr(own, name)) is not None}
        flat = [
            (values if values.dim() > 1 else values[:, None]).to(own.sums)
            for values in found.values()
        ]
        widths = [part.shape[1] for part in flat]
        gathered = self.group.all_gather(torch.cat(flat, 1), sizes).split(widths, 1)
        return RowLosses(
            **{
                name: part if name in ("logits", "slopes") else part[:, 0]
                for name, part in zip(found, gathered, strict=True)
            }
        )

    def noise_sum(self, perturbation: Perturbation, place: BatchPosition) -> NoiseSum:
        """Return what the rows of this process are summed in."""
        del place
        return NoiseSum(perturbation)

    def trace(
        self,
        parts: Sequence[tuple[Rows, Tensor]],
        place: BatchPosition,
        factor: float,
        normalizer: float,
    ) -> UpdateRecord | None:
        """Return what the update was made of, None where no process has all chunks."""
        return UpdateRecord.of(parts, place.position, factor, normalizer)

    def reduce(self, own: list[Tensor], *, last: bool) -> list[Tensor] | None:
        """Return the sums over all processes, and over the batches since the last time; None while
        more are to come.

        Args:
            own: what this process has of each.
            last: whether the batch is the last of its optimizer step.
        """
        del last
        return own

    def discard(self) -> None:
        """Drop what was put off: its step is not taken."""


class SingleProcess(Exchange):
    """No other process: nothing has to travel."""

    def clean_pieces(self, samples: int, *, head: bool) -> list[slice]:
        """See `Exchange`."""
        del head
        return [slice(0, samples)]

    def parts(
        self, rows: Rows, feed: TrimmedBatch, *, shares_noise: bool, chunk: int | None = None
    ) -> list[Rows]:
        """See `Exchange`."""
        del chunk
        return [feed.ordered(rows if shares_noise else rows.sorted(), within_groups=shares_noise)]


class GradientAllReduce(Exchange):
    """The update is the sum of what each process pulled back: as many numbers as the adapter has
    travel, once per step.

    Args:
        group: the other processes.
        every_batch: sum after every batch of an optimizer step, for those who decide by each one's
            signal.
    """

    def __init__(self, group: ProcessGroup | None = None, *, every_batch: bool = False) -> None:
        super().__init__(group)
        self.every_batch = every_batch
        self._pending: list[Tensor] | None = None

    @property
    def pending(self) -> bool:  # type: ignore[override]
        """See `Exchange`."""
        return self._pending is not None

    def counts_exact(self, pieces: Sequence[slice]) -> bool:
        """See `Exchange`: what all processes have alike is added by the first only."""
        return len(pieces) > 1 or self.group.rank == 0

    def trace(
        self,
        parts: Sequence[tuple[Rows, Tensor]],
        place: BatchPosition,
        factor: float,
        normalizer: float,
    ) -> UpdateRecord | None:
        """See `Exchange`."""
        del parts, place, factor, normalizer
        return None

    def reduce(self, own: list[Tensor], *, last: bool) -> list[Tensor] | None:
        """See `Exchange`."""
        pending, self._pending = self._pending, None
        sums = own if pending is None else [a + b for a, b in zip(pending, own, strict=True)]
        if last or self.every_batch:
            return [self.group.all_reduce(part) if part.numel() else part for part in sums]
        self._pending = sums
        return None

    def discard(self) -> None:
        """See `Exchange`."""
        self._pending = None


class ScalarExchange(Exchange):
    """Every process makes the update from the coefficients of all rows: nothing else travels, but
    all noise is drawn twice.

    References:
        Malladi et al. (2023), MeZO, arXiv 2305.17333, section 2.1, on updates that are seeds and
        scalars.
    """

    def check(self, *, control: bool, replays: bool) -> None:
        """See `Exchange`."""
        if control:
            raise ConfigurationError(
                'A control variate learns from gradients: with reduce="scalars" there is none.'
            )
        if replays:
            raise ConfigurationError(
                'reduce="scalars" draws all noise again in every process, but noise on outputs '
                'needs the forwards too: use perturbation="auto" or "rowwise".'
            )

    def clean_pieces(self, samples: int, *, head: bool) -> list[slice]:
        """See `Exchange`: the gradient of a head must not travel, so each process runs all samples
        for it.
        """
        return [slice(0, samples)] if head else super().clean_pieces(samples, head=head)

    def noise_sum(self, perturbation: Perturbation, place: BatchPosition) -> NoiseSum:
        """See `Exchange`."""
        return RegeneratedSum(perturbation, place)


def gradient_exchange(group: ProcessGroup | None = None, *, every_batch: bool = False) -> Exchange:
    """Return the sum of gradients, or, where there is one process, nothing to sum."""
    alone = group is None or group.world == 1
    return SingleProcess(group) if alone else GradientAllReduce(group, every_batch=every_batch)


def scalar_exchange(group: ProcessGroup | None = None, *, every_batch: bool = False) -> Exchange:
    """Return the exchange of scalars, whose updates are always those of one batch."""
    del every_batch
    return ScalarExchange(group)


EXCHANGES: dict[str, Callable[..., Exchange]] = {
    "gradient": gradient_exchange,
    "scalars": scalar_exchange,
}
REDUCE = tuple(EXCHANGES)
