"""How the processes of a run come to the same update: by summing gradients, or by telling each other scalars."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .objectives import RowLosses
from .padding import Feed
from .perturbations import Perturbation
from .regenerate import in_turn, regenerate
from .rows import Place, Rows
from .share import Share

REDUCE = ("gradient", "scalars")
_NOISE = 2**26  # bytes of noise that are held at a time when an update is made again


class Exchange:
    """What processes share of a step: its samples and rows evenly, its numbers all, and in the end its update.

    All processes hold the whole batch. Rows are cut into even pieces by number, whatever samples they repeat. Losses and
    deltas are gathered, so that every process decides by the same numbers. Then the update either is the sum of what each
    process pulled back ("gradient": as many numbers as the adapter has travel, once per optimizer step), or is made again by
    each process from the coefficients of all rows ("scalars": nothing else travels, but all noise is drawn everywhere).

    Args:
        share: the other processes.
        reduce: "gradient" or "scalars".
        every_batch: sum gradients after every batch of an optimizer step, for those who decide by each one's signal.

    References:
        Malladi et al. (2023), MeZO, arXiv 2305.17333, section 2.1, on updates that are seeds and scalars.
    """

    def __init__(self, share: Share | None = None, reduce: str = "gradient", *, every_batch: bool = False) -> None:
        self.share, self.scalars, self.every_batch = share or Share(), reduce == "scalars", every_batch
        self._waiting: list[Tensor] | None = None

    @property
    def alone(self) -> bool:
        """Whether there is only one process."""
        return self.share.world == 1

    def parts(self, rows: Rows, feed: Feed, *, grouped: bool, chunk: int | None = None) -> list[Rows]:
        """Cut rows into the pieces of all processes, each in the order in which it goes through the model.

        Rows of a sample stay together where noise is per row, so that what runs once per sample runs in few processes; where
        noise is shared those of a group do, so that forwards stay large. Whole chunks are dealt out where there are enough
        to be fair, because then what a forward is given, and so its rounding, does not depend on the number of processes.

        Args:
            rows: of all processes.
            feed: knows which rows have padding.
            grouped: whether noise is shared.
            chunk: rows that go through the model at a time, if that is fixed.
        """
        world, chunks = self.share.world, -(-len(rows) // chunk) if chunk else 0
        rows = rows if grouped else rows.sorted()
        fair = chunks >= world and (chunks % world == 0 or chunks >= 4 * world)
        if self.alone or grouped or not fair:
            return [feed.ordered(rows[own], within_groups=grouped) for own in self.share.cut(len(rows))]
        ordered = feed.ordered(rows, within_groups=False)
        dealt: list[list[Tensor]] = [[] for _ in range(world)]
        for number, index in enumerate(torch.arange(len(rows)).tensor_split(chunks)):
            turn = number % (2 * world)  # 0, 1, 2, 2, 1, 0, 0, ...: the first chunks have the widest rows
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
        found, rows = self.share.gather(own, sizes), parts[0]
        for part in parts[1:]:
            rows = rows.then(part)
        mine = torch.repeat_interleave(torch.arange(self.share.world), torch.tensor(sizes)) == self.share.rank
        order = rows.order()
        return rows[order], found[order], mine[order]

    def losses(self, own: RowLosses, sizes: Sequence[int], *, logits: bool) -> RowLosses:
        """Put the clean losses of all processes together; logits and slopes only if they are wanted."""
        names = ["sums", "counts", "residuals"] + ["logits", "slopes"] * logits
        found = {name: values for name in names if (values := getattr(own, name)) is not None}
        flat = [(values if values.dim() > 1 else values[:, None]).to(own.sums) for values in found.values()]
        widths = [part.shape[1] for part in flat]
        gathered = self.share.gather(torch.cat(flat, 1), sizes).split(widths, 1)
        return RowLosses(
            **{
                name: part if name in ("logits", "slopes") else part[:, 0]
                for name, part in zip(found, gathered, strict=True)
            }
        )

    def settle(self, own: list[Tensor], *, last: bool) -> list[Tensor] | None:
        """Return the sums over all processes, and over the batches since the last time; None while more are to come.

        Args:
            own: what this process has of each.
            last: whether the batch is the last of its optimizer step.
        """
        if self.alone or self.scalars:
            return own
        waiting, self._waiting = self._waiting, None
        sums = own if waiting is None else [a + b for a, b in zip(waiting, own, strict=True)]
        if last or self.every_batch:
            return [self.share.total(part) if part.numel() else part for part in sums]
        self._waiting = sums
        return None

    @property
    def waiting(self) -> bool:
        """Whether batches of the optimizer step have been put off."""
        return self._waiting is not None

    def forget(self) -> None:
        """Drop what was put off: its step is not taken."""
        self._waiting = None

    def regenerated(
        self, perturbation: Perturbation, place: Place, rows: Rows, coefficients: Tensor
    ) -> tuple[Tensor, list[tuple[Rows, Tensor]]]:
        """Make the update (d,) from the coefficients (R,) of all rows; returns also the chunks that it is the sum of."""
        size = max(1, min(4096, int(_NOISE // max(1.0, perturbation.row_bytes))))
        positions = rows.owner + place.position
        update = regenerate(perturbation, place.seed, place.step, positions, rows.query, coefficients, rows.group, size)
        chunks = in_turn(rows.group, size, grouped=perturbation.grouped)
        return update, [(rows[chunk], coefficients[chunk]) for chunk in chunks]
