"""Models whose weights are sharded over processes: all must run the same number of forwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..base.sharding import sharded_root
from .collectives import ProcessGroup


class EvenForwards:
    """Lets every process of a run take part in every forward of a sharded model.

    A forward gathers weights from all processes, but the processes have different numbers of
    chunks. So they agree before each forward, and before whatever else they exchange: while one of
    them has a forward to run, those that have none run one row for its sake and drop the result.

    Args:
        root: contains all sharded modules.
        group: the processes.
    """

    def __init__(self, root: nn.Module, group: ProcessGroup) -> None:
        self.root, self.group, self._busy = root, group, False
        self._row: tuple[tuple, dict[str, Any]] = (), {}
        group.before = self._wait
        root.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)

    @classmethod
    def of(cls, model: nn.Module, group: ProcessGroup) -> None:
        """Start with a model that is sharded, if this has not been done; do nothing with others."""
        root = sharded_root(model)
        if root is not None and group.world > 1 and group.before is None:
            cls(root, group)

    def _anyone(self, own: bool) -> bool:
        """Return whether any process has a forward to run."""
        self._busy = True
        try:
            return bool(self.group.all_reduce(torch.tensor([int(own)])).item())
        finally:
            self._busy = False

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._busy:
            return
        self._row = tree_map(_first_row, (args, kwargs))
        self._anyone(True)

    def _wait(self) -> None:
        """Run forwards for others until none of them has one."""
        if self._busy:
            return
        while self._anyone(False):
            self._busy = True
            try:
                with torch.no_grad():
                    self.root(*self._row[0], **self._row[1])
            finally:
                self._busy = False


def _first_row(value: object) -> object:
    return value[:1] if isinstance(value, Tensor) and value.dim() > 0 else value
