"""Training by several processes: all read the same batches, none is wrapped for a backward pass,
and they agree or stop.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from hashlib import blake2b
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from transformers.trainer_utils import seed_worker

from ..base.batch import Inputs
from ..distributed.collectives import ProcessGroup, TorchProcessGroup
from ..errors import ConfigurationError
from .args import FlopsArgumentsMixin
from .checkpoints import SaveOnSigterm

logger = logging.getLogger("hf_flops.trainer")
_SAME = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
)


def start_group(args: Any, before: ProcessGroup | None) -> ProcessGroup:
    """Return the processes of a run: `before` where they have met already.

    Raises:
        ConfigurationError: each process would get other samples.
    """
    if args.world_size > 1 and str(args.train_sampling_strategy) == "batch_rebalance":
        raise ConfigurationError(
            "train_sampling_strategy='batch_rebalance' gives each process other samples: use "
            "another."
        )
    if isinstance(before, TorchProcessGroup):
        return before
    return TorchProcessGroup(args.device) if args.world_size > 1 else ProcessGroup()


class Lockstep:
    """Makes sure that all processes of a run do the same.

    Every process reads the batch of all of them, `per_device_train_batch_size` times their number.
    So no samples have to travel, batches are those of one process that has so large a batch, and
    every sample is known where its queries run.

    Args:
        group: the processes.
        args: the run's arguments.
        leave: knows whether this process was told to leave, and hears whether another one was.
    """

    def __init__(self, group: ProcessGroup, args: Any, leave: SaveOnSigterm) -> None:
        self.group, self.args, self.leave = group, args, leave
        self._met = False

    def check(self, model: nn.Module, inputs: Inputs, step: int) -> None:
        """Compare arguments, parameters and data, and hear whether one of the processes was told to
        leave.

        Raises:
            ConfigurationError: they have other arguments, parameters or data.
        """
        if self.group.world == 1:
            return
        if not self._met:
            self._meet(model)
        own = torch.tensor([2 * fingerprint(inputs) + self.leave.asked])
        found = self.group.all_gather(own, [1] * self.group.world)
        other = torch.nonzero(found // 2 != found[0] // 2).flatten().tolist()
        if other:
            raise ConfigurationError(
                f"At optimizer step {step} process {other[0]} has other samples than process 0, "
                "but all must read the same: give every process the whole data set, and let "
                "augmentation depend on the global generators only."
            )
        self.leave.agreed = bool((found % 2).any())

    def _meet(self, model: nn.Module) -> None:
        """Compare arguments, and take the first process's trainable parameters."""
        names = [*_SAME, *(field.name for field in fields(FlopsArgumentsMixin))]
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        said = {name: getattr(self.args, name) for name in names}
        self.group.assert_same({**said, "the trained parameters' shapes": shapes}, "at the start")
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data.copy_(self.group.broadcast(parameter.data))
        self._met = True


def undivided_loader(
    trainer: Any, stock: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Build a stock trainer's data loader; the one for training reads the batches of all processes.

    Args:
        trainer: whose accelerator prepares the loader.
        stock: builds it.
        args: for `stock`.
        kwargs: for `stock`.
    """
    given, world = inspect.signature(stock).bind(*args, **kwargs), trainer.args.world_size
    if world == 1 or not given.arguments.get("is_training"):
        return stock(*args, **kwargs)
    given.arguments["batch_size"] *= world
    accelerator, trainer.accelerator = trainer.accelerator, _Undivided(trainer.accelerator)
    try:
        return stock(*given.args, **given.kwargs)
    finally:
        trainer.accelerator = accelerator


class BatchSize:
    """How many samples an optimizer step has; a run that is resumed with another number goes
    another way.

    Args:
        samples: of all processes and micro-batches.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def state_dict(self) -> dict[str, int]:
        """Return what a resume compares."""
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Compare with a state from `state_dict`."""
        if state["samples"] != self.samples:
            logger.warning(
                "The checkpoint's run had %d samples in an optimizer step, this one has %d and "
                "will differ: the number is processes x per_device_train_batch_size x "
                "gradient_accumulation_steps.",
                state["samples"],
                self.samples,
            )


class _Undivided:
    """Stands in for an accelerator that is to prepare a data loader, and leaves it whole for every
    process.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def prepare(self, loader: Any) -> Any:
        """Prepare a data loader as for a single process."""
        own = self._accelerator
        # the same augmentation
        loader.worker_init_fn = partial(seed_worker, num_workers=loader.num_workers, rank=0)
        return prepare_data_loader(
            loader,
            own.device,
            num_processes=1,
            process_index=0,
            put_on_device=own.device_placement,
            rng_types=list(own.rng_types),
            dispatch_batches=False,
            use_seedable_sampler=own.use_seedable_sampler,
            data_seed=own.dataloader_config.data_seed,
            non_blocking=own.non_blocking,
        )


def fingerprint(inputs: Inputs) -> int:
    """Return a number of 62 bits that depends on every sample of a batch and on their order.

    Of tensors it sees the sums of each sample's bits, which takes next to no time.
    """
    seen = blake2b(digest_size=8)
    for name, value in sorted(inputs.items()):
        seen.update(name.encode())
        if torch.is_tensor(value):
            seen.update(repr((tuple(value.shape), value.dtype)).encode())
            raw = value.detach().contiguous().reshape(len(value) if value.dim() else 1, -1)
            words = raw.view(torch.int16 if raw.element_size() % 2 == 0 else torch.uint8)
            seen.update(words.sum(1, dtype=torch.int64).cpu().numpy().tobytes())
        else:
            seen.update(repr(value).encode())
    return int.from_bytes(seen.digest(), "big") >> 2
