"""The self-check of activation noise: weights affect the loss through one output, row by row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from ..base.patching import Call
from ..base.prng import seeds
from ..base.probe import Attempt, agree
from .activation import is_linear
from .base import ParameterVector
from .noise import draw
from .shared import displaced, moved
from .sites import Site, find_sites

_SEED = 20411  # arbitrary; separates the check's noise from that of training


class PinCheck:
    """Finds the tensors for which noise on outputs is valid, and smaller than noise on weights.

    Args:
        model: the model, in evaluation mode.
        sums: runs two rows through the model and returns their loss sums (2,).
        precision: relative error of a loss due to rounding.
    """

    def __init__(self, model: nn.Module, sums: Callable[[], Tensor], precision: float) -> None:
        self.model, self.sums, self.precision = model, sums, precision

    def run(self, names: Collection[str], *, smaller: bool) -> list[str]:
        """Return the names of tensors that can have activation noise.

        Args:
            names: candidates, all with a valid per-row rule.
            smaller: whether to choose only layers that get one token of each row, as heads on a
                pooled output do, and whose activation noise has at most half as many numbers as
                noise on the weights. With more tokens it costs a factorisation per row, and the
                noise depends on the row's padding.
        """
        vector = ParameterVector.of(self.model, set(names))
        sites = find_sites(self.model, vector)
        with moved(self.model, seeds(_SEED, 1)):
            start, outputs = self._record(sites)
            fit = [
                site
                for site, calls in zip(sites, outputs, strict=True)
                if self._fits(site, calls, smaller)
            ]
            number = -1
            while len(fit) != number:  # a tensor of several sites must fit at all of them
                number = len(fit)
                others = {i for site in sites if site not in fit for i in site.tensors.values()}
                fit = [site for site in fit if others.isdisjoint(site.tensors.values())]
            chosen = {vector.names[i] for site in fit for i in site.tensors.values()}
            pinned = [
                out
                for site, calls in zip(sites, outputs, strict=True)
                for out in calls
                if site in fit and torch.is_tensor(out)
            ]
            with Attempt("Noise is added to the weights, not to outputs"):
                if chosen and self._pinned(fit, pinned, chosen, start) and self._apart(fit, start):
                    return [name for name in names if name in chosen]
        return []

    def _fits(self, site: Site, calls: Sequence[object], smaller: bool) -> bool:
        if (
            not is_linear(site)
            or len(calls) != 1
            or not torch.is_tensor(calls[0])
            or len(calls[0]) % 2
        ):
            return False
        numbers = calls[0].numel() // 2
        weights = sum(
            p.numel()
            for name, p in site.module.named_parameters(recurse=False)
            if name in site.tensors
        )
        return not smaller or (numbers == calls[0].shape[-1] and 2 * numbers <= weights)

    def _run(self, sites: Sequence[Site], hooks: Sequence[Call]) -> Tensor:
        with ExitStack() as stack:
            for site, hook in zip(sites, hooks, strict=True):
                stack.enter_context(site.module.register_forward_hook(hook))
            return self.sums()

    def _record(self, sites: Sequence[Site]) -> tuple[Tensor, list[list[object]]]:
        """Return the loss sums (2,) and, for each site, the outputs of its calls."""
        outputs: list[list[object]] = [[] for _ in sites]

        def keep(calls: list[object], module: nn.Module, args: object, out: object) -> None:
            calls.append(out)

        return self._run(sites, [partial(keep, calls) for calls in outputs]), outputs

    def _same(self, losses: Tensor, wanted: Tensor) -> bool:
        return agree(losses, wanted, self.precision / 2)

    def _pinned(
        self, sites: Sequence[Site], outputs: Sequence[Tensor], names: set[str], start: Tensor
    ) -> bool:
        """Return whether changed weights do not change the losses while the outputs are fixed."""
        vector = ParameterVector.of(self.model, names)
        shift = draw("gaussian", seeds(_SEED, 0), vector.shapes, vector.device)[0]
        fixed = [lambda *_, value=value: value for value in outputs]
        with displaced(vector, shift):
            return self._same(self._run(sites, fixed), start)

    def _apart(self, sites: Sequence[Site], start: Tensor) -> bool:
        """Return whether noise on the outputs of one row does not change the other row's loss."""

        def disturb(row: int, module: nn.Module, args: object, out: Tensor) -> Tensor:
            out = out.clone()
            half = out.view(2, -1)[row]
            half += out.float().std() * torch.linspace(-1, 1, half.numel()).to(out)
            return out

        losses = [self._run(sites, [partial(disturb, row)] * len(sites)) for row in range(2)]
        return self._same(losses[0][1], start[1]) and self._same(losses[1][0], start[0])
