"""Training by several processes: all read the same batches, and agree or stop."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from hashlib import blake2b
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import seed_worker

from ..base.batch import Inputs
from ..base.state import whole
from ..distributed.collectives import ProcessGroup, TorchProcessGroup
from ..errors import ConfigurationError
from .args import FlopsArgumentsMixin
from .sigterm import SaveOnSigterm

logger = logging.getLogger("hf_flops.trainer")
_SAME = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "num_train_epochs",
)


def start_group(args: TrainingArguments, before: ProcessGroup | None) -> ProcessGroup:
    """Return the processes of a run: `before` if it has connected them already.

    Raises:
        ConfigurationError: processes would get different samples.
    """
    if args.world_size > 1 and str(args.train_sampling_strategy) == "batch_rebalance":
        raise ConfigurationError(
            "train_sampling_strategy='batch_rebalance' gives each process other samples: choose "
            "another one."
        )
    if isinstance(before, TorchProcessGroup):
        return before
    return TorchProcessGroup(args.device) if args.world_size > 1 else ProcessGroup()


class Lockstep:
    """Makes sure that all processes of a run do the same.

    Every process reads the batch of all of them, `per_device_train_batch_size` times their number.
    So processes exchange no samples, batches are those of one process with so large a batch, and
    any process can run the queries of any sample.

    Args:
        group: the processes.
        args: the run's arguments.
        leave: of this process; it also learns whether another process got SIGTERM.
    """

    def __init__(self, group: ProcessGroup, args: TrainingArguments, leave: SaveOnSigterm) -> None:
        self.group, self.args, self.leave = group, args, leave
        self._met = False

    def check(self, model: nn.Module, inputs: Inputs, step: int) -> None:
        """Compare arguments, parameters and data, and learn whether a process got SIGTERM.

        Raises:
            ConfigurationError: they have different arguments, parameters or data.
        """
        if self.group.world == 1:
            return
        if not self._met:
            self._meet(model)
        message = 2 * fingerprint(inputs) + self.leave.asked
        messages = self.group.all_gather(torch.tensor([message]), [1] * self.group.world)
        other = torch.nonzero(messages // 2 != messages[0] // 2).flatten().tolist()
        if other:
            raise ConfigurationError(
                f"At optimizer step {step} process {other[0]} has other samples than process 0, "
                "but all must read the same: give every process the whole data set, and let "
                "augmentation depend on the global generators only."
            )
        self.leave.agreed = bool((messages % 2).any())

    def _meet(self, model: nn.Module) -> None:
        """Compare arguments, and take the first process's trainable parameters."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        names = [*_SAME, *(field.name for field in fields(FlopsArgumentsMixin))]
        values: dict[str, object] = {name: getattr(self.args, name) for name in names}
        values["the trained parameters' shapes"] = {n: tuple(p.shape) for n, p in trained.items()}
        self.group.assert_same(values, "at the start")
        for parameter in trained.values():
            parameter.data.copy_(self.group.broadcast(parameter.data))
        self._met = True


def undivided_loader(
    trainer: Trainer, stock: Callable[..., DataLoader], args: tuple, kwargs: dict[str, Any]
) -> DataLoader:
    """Build a stock trainer's data loader; the one for training reads the batches of all processes.

    Args:
        trainer: whose accelerator prepares the loader.
        stock: builds it.
        args: for `stock`.
        kwargs: for `stock`.
    """
    bound, world = inspect.signature(stock).bind(*args, **kwargs), trainer.args.world_size
    if world == 1 or not bound.arguments.get("is_training"):
        return stock(*args, **kwargs)
    if not trainer.accelerator.split_batches:
        bound.arguments["batch_size"] *= world
    accelerator, trainer.accelerator = trainer.accelerator, _Undivided(trainer.accelerator)
    try:
        return stock(*bound.args, **bound.kwargs)
    finally:
        trainer.accelerator = accelerator


class BatchSize:
    """The samples of an optimizer step: with another number, a resumed run differs.

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
        if whole(state["samples"], 1) != self.samples:
            logger.warning(
                "The checkpoint's run had %d samples in an optimizer step, this one has %d and "
                "will differ: the number is processes x per_device_train_batch_size x "
                "gradient_accumulation_steps.",
                state["samples"],
                self.samples,
            )


class _Undivided:
    """Replaces an accelerator that prepares a data loader: each process gets whole batches."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def prepare(self, loader: DataLoader) -> DataLoader:
        """Prepare a data loader as for a single process."""
        accelerator = self._accelerator
        # the same augmentation
        loader.worker_init_fn = partial(seed_worker, num_workers=loader.num_workers, rank=0)
        return prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=accelerator.device_placement,
            rng_types=list(accelerator.rng_types),
            dispatch_batches=False,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
        )


def fingerprint(inputs: Inputs) -> int:
    """Return a number of 62 bits that depends on every sample of a batch and on their order.

    Of tensors it uses the sums of each sample's bits, which is fast.
    """
    digest = blake2b(digest_size=8)
    for name, value in sorted(inputs.items()):
        digest.update(name.encode())
        if torch.is_tensor(value):
            digest.update(repr((tuple(value.shape), value.dtype)).encode())
            raw = value.detach().contiguous().reshape(len(value) if value.dim() else 1, -1)
            words = raw.view(torch.int16 if raw.element_size() % 2 == 0 else torch.uint8)
            digest.update(words.sum(1, dtype=torch.int64).cpu().numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return int.from_bytes(digest.digest(), "big") >> 2
