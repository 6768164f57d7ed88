"""How the processes of a run compute the same update: alone, by all-reduce, or by scalars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

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
    """Divides a step among processes, and combines their results.

    All processes have the whole batch. Rows are divided evenly by number. Losses and deltas are
    gathered, so that all processes take the same decisions. Subclasses define how the update is
    reduced.

    Args:
        group: the other processes.
        every_batch: whether to reduce after every batch, for features that need each batch's
            signal.
    """

    _pending: list[Tensor] | None = None

    def __init__(self, group: ProcessGroup | None = None, *, every_batch: bool = False) -> None:
        self.group, self.every_batch = group or ProcessGroup(), every_batch

    @property
    def pending(self) -> bool:
        """Whether earlier batches of the optimizer step wait for their reduction."""
        return self._pending is not None

    def check(self, *, control: bool, replays: bool) -> None:
        """Raise an error for methods that this exchange does not support.

        Args:
            control: whether there is a control variate.
            replays: whether summing noise needs a forward under the same noise.
        """

    def clean_pieces(self, samples: int, *, head: bool) -> list[slice]:
        """Return the samples of each process's clean forward; one slice means that all run all.

        Args:
            samples: B.
            head: whether there is a closed-form head.
        """
        del head
        return self.group.partition(samples, 2) if samples >= 4 else [slice(0, samples)]

    def counts_exact(self, pieces: Sequence[slice]) -> bool:
        """Return whether this process adds its samples' exact gradient, given `clean_pieces`."""
        del pieces
        return True

    def parts(
        self, rows: Rows, feed: TrimmedBatch, *, shares_noise: bool, chunk: int | None = None
    ) -> list[Rows]:
        """Divide rows among the processes; each part is in the order of its forwards.

        With noise per row, rows of a sample stay together, so that late expansion runs a sample in
        few processes; with shared noise, rows of a group do, so that forwards stay large. If there
        are enough chunks for an even division, whole chunks are divided: then the inputs of a
        forward, and so its rounding, do not depend on the number of processes.

        Args:
            rows: of all processes.
            feed: knows the padding of rows.
            shares_noise: whether noise is shared.
            chunk: rows that go through the model at a time, if that is fixed.
        """
        world, chunks = self.group.world, -(-len(rows) // chunk) if chunk else 0
        rows = rows if shares_noise else rows.sorted()
        fair = chunks >= world and (chunks % world == 0 or chunks >= 4 * world)
        if shares_noise or not fair:
            return [
                feed.ordered(rows[part], within_groups=shares_noise)
                for part in self.group.partition(len(rows))
            ]
        ordered = feed.ordered(rows, within_groups=False)
        dealt: list[list[Tensor]] = [[] for _ in range(world)]
        for number, index in enumerate(torch.arange(len(rows)).tensor_split(chunks)):
            # 0, 1, 2, 2, 1, 0, 0, ...: the first chunks have the widest rows
            turn = number % (2 * world)
            dealt[min(turn, 2 * world - 1 - turn)].append(index)
        return [ordered[torch.cat(indices)] for indices in dealt]

    def gathered(self, parts: Sequence[Rows], results: Tensor) -> tuple[Rows, Tensor, Tensor]:
        """Gather the results of all rows, in an order that is the same for any number of processes.

        Args:
            parts: the rows of each process.
            results: (r, C) of this process's rows.

        Returns:
            All rows, (R, C) their results, and (R,) whether this process ran them.
        """
        sizes, rows = [len(part) for part in parts], reduce(Rows.then, parts)
        rank = torch.arange(self.group.world).repeat_interleave(torch.tensor(sizes))
        order = rows.order()
        everything = self.group.all_gather(results, sizes)
        return rows[order], everything[order], (rank == self.group.rank)[order]

    def losses(self, losses: RowLosses, sizes: Sequence[int], *, logits: bool) -> RowLosses:
        """Gather the clean losses of all processes; with logits and slopes only if `logits`."""
        names = ["sums", "counts", "residuals"] + ["logits", "slopes"] * logits
        names += ["targets", "weights"]
        fields = {name: values for name in names if (values := getattr(losses, name)) is not None}
        columns = [
            (values if values.dim() > 1 else values[:, None]).to(losses.sums)
            for values in fields.values()
        ]
        gathered = self.group.all_gather(torch.cat(columns, 1), sizes).split(
            [part.shape[1] for part in columns], 1
        )
        return RowLosses(
            mean=losses.mean,
            **{
                name: part if fields[name].dim() > 1 else part[:, 0]
                for name, part in zip(fields, gathered, strict=True)
            },
        )

    def noise_sum(self, perturbation: Perturbation, place: BatchPosition) -> NoiseSum:
        """Return the sum for the noise of this process's rows."""
        del place
        return NoiseSum(perturbation)

    def trace(
        self,
        parts: Sequence[tuple[Rows, Tensor]],
        place: BatchPosition,
        factor: float,
        normalizer: float,
    ) -> UpdateRecord | None:
        """Return the record of the update; None if no process has all chunks."""
        return UpdateRecord.of(parts, place.position, factor, normalizer)

    def reduce(self, terms: list[Tensor], *, last: bool) -> list[Tensor] | None:
        """Return the sums over all processes and pending batches; None if the batch is put off.

        Args:
            terms: of this process.
            last: whether the batch is the last of its optimizer step.
        """
        del last
        return terms

    def discard(self) -> None:
        """Drop the pending batches of a step that is not taken."""
        self._pending = None


class SingleProcess(Exchange):
    """A run with one process, which gets all rows: the defaults."""


class GradientAllReduce(Exchange):
    """Sums the processes' gradients with an all-reduce, once per optimizer step or batch."""

    def counts_exact(self, pieces: Sequence[slice]) -> bool:
        """See `Exchange`: if all processes have the same samples, only the first adds them."""
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

    def reduce(self, terms: list[Tensor], *, last: bool) -> list[Tensor] | None:
        """See `Exchange`."""
        pending, self._pending = self._pending, None
        sums = terms if pending is None else [a + b for a, b in zip(pending, terms, strict=True)]
        if last or self.every_batch:
            return [self.group.all_reduce(part) if part.numel() else part for part in sums]
        self._pending = sums
        return None


class ScalarExchange(Exchange):
    """Every process computes the update from all coefficients: scalars are sent, noise drawn twice.

    References:
        Malladi et al. (2023), MeZO, arXiv 2305.17333, section 2.1, on updates that are seeds and
        scalars.
    """

    def check(self, *, control: bool, replays: bool) -> None:
        """See `Exchange`."""
        if control:
            raise ConfigurationError(
                'A control variate needs gradients, which reduce="scalars" does not exchange: use '
                'reduce="gradient" or control_variate="none".'
            )
        if replays:
            raise ConfigurationError(
                'reduce="scalars" draws all noise again in every process, but noise on outputs '
                'needs the forwards too: use perturbation="auto" or "rowwise".'
            )

    def clean_pieces(self, samples: int, *, head: bool) -> list[slice]:
        """See `Exchange`: with a head every process runs all samples; gradients are not sent."""
        return [slice(0, samples)] if head else super().clean_pieces(samples, head=head)

    def noise_sum(self, perturbation: Perturbation, place: BatchPosition) -> NoiseSum:
        """See `Exchange`."""
        return RegeneratedSum(perturbation, place)


def gradient_exchange(group: ProcessGroup | None = None, *, every_batch: bool = False) -> Exchange:
    """Return the all-reduce of gradients, or the exchange of a single process."""
    if group is None or group.world == 1:
        return SingleProcess(group)
    return GradientAllReduce(group, every_batch=every_batch)


EXCHANGES: dict[str, Callable[..., Exchange]] = {
    "gradient": gradient_exchange,
    "scalars": ScalarExchange,
}
REDUCE = tuple(EXCHANGES)
