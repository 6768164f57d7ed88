"""Training by several processes: all read the same batches, none is wrapped for a backward pass, and they agree or stop."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from hashlib import blake2b
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from transformers.trainer_utils import seed_worker

from .args import FlopsArgumentsMixin
from .errors import ConfigurationError
from .exchange import EXCHANGES, Exchange
from .method import Method
from .share import ProcessShare, Share

logger = logging.getLogger("hf_flops.trainer")
_SAME = ("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs")


class ManyProcesses:
    """The part of a trainer that knows of other processes; to be put before a class derived from `transformers.Trainer`.

    Every process reads the batch of all of them, `per_device_train_batch_size` times their number. So no samples have to
    travel, batches are those of one process that has so large a batch, and every sample is known where its queries run.
    """

    _share: Share
    _exchange: Exchange
    _met = False

    def _start_sharing(self: Any) -> None:
        """Begin a run: with what the arguments say, and as if the processes had never met."""
        args = self.args
        if args.world_size > 1 and str(args.train_sampling_strategy) == "batch_rebalance":
            raise ConfigurationError(
                "train_sampling_strategy='batch_rebalance' gives each process other samples: use another."
            )
        if not isinstance(getattr(self, "_share", None), ProcessShare):
            self._share = ProcessShare(args.device) if args.world_size > 1 else Share()
        self._exchange = EXCHANGES[args.reduce](self._share, every_batch=args.queries_per_sample == "auto")
        self._met = False

    def _meet(self: Any, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Make sure that all processes do the same, and hear whether one of them was told to leave.

        Raises:
            ConfigurationError: they have other arguments, parameters or data.
        """
        if self._share.world == 1:
            return
        if not self._met:
            names = [*_SAME, *(field.name for field in fields(FlopsArgumentsMixin))]
            shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
            said = {name: getattr(self.args, name) for name in names}
            self._share.agree({**said, "the trained parameters' shapes": shapes}, "at the start")
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.data.copy_(self._share.first(parameter.data))
            self._met = True
        own = torch.tensor([2 * fingerprint(inputs) + self._leave.asked])
        found = self._share.gather(own, [1] * self._share.world)
        other = torch.nonzero(found // 2 != found[0] // 2).flatten().tolist()
        if other:
            raise ConfigurationError(
                f"At optimizer step {self.state.global_step} process {other[0]} has other samples than process 0, but all "
                "must read the same: give every process the whole data set, and let augmentation depend on the global "
                "generators only."
            )
        self._leave.agreed = bool((found % 2).any())

    def _agreed(self: Any, method: Method) -> Method:
        """Let all processes take the same way, which the first batch has shown; returns the method with it."""
        named = {id(module): name for name, module in self.model.named_modules()}
        what = method.perturbation
        self._share.agree(
            {
                "the objective": type(method.objective).__name__,
                "noise": [type(part).__name__ for part in getattr(what, "parts", [what])],
                "the tensors with noise": what.vector.names,
                "the closed-form head": None if method.head is None else method.head.vector.names,
                "what runs once per sample": [named.get(id(module)) for module in method.reuse.modules],
                "the padding that is cut off": sorted(method.trimmed),
            },
            "in what the first batch shows",
        )
        scale = self._share.first(method.scale)
        self._tuning.found.update({"perturbation_scale": scale} if "perturbation_scale" in self._tuning.found else {})
        return replace(method, scale=scale)

    def _count_together(self: Any, before: tuple[int, int], ran: int) -> None:
        """Enter into the ledger the rows that all processes ran since it said `before`; what each ran alike counts once."""
        if self._share.world > 1:
            rows, tokens = before
            self.ledger.all_rows = rows + ran
            self.ledger.tokens = tokens + int(
                self._share.total(torch.tensor([self.ledger.tokens - tokens], dtype=torch.int32))
            )

    def _traffic(self: Any) -> dict[str, int]:
        """Return what the log says about other processes."""
        return {"sent_bytes": self._share.sent} if self._share.world > 1 else {}

    def _batch(self: Any) -> BatchSize:
        return BatchSize(self.get_total_train_batch_size(self.args))

    def _wrap_model(self: Any, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Leave the model as it is: there is no backward pass for DistributedDataParallel to wait for."""
        if training and model is self.model and self.args.world_size > 1:
            return self.accelerator.prepare_model(model, evaluation_mode=True)
        return super()._wrap_model(model, training, dataloader)  # type: ignore[misc]

    def _get_dataloader(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Build the stock trainer's data loader; the one for training reads the batches of all processes."""
        stock: Any = super()._get_dataloader  # type: ignore[misc]
        given = inspect.signature(stock).bind(*args, **kwargs)
        world = self.args.world_size
        if world == 1 or not given.arguments.get("is_training"):
            return stock(*args, **kwargs)
        given.arguments["batch_size"] *= world
        accelerator, self.accelerator = self.accelerator, _Undivided(self.accelerator)
        try:
            return stock(*given.args, **given.kwargs)
        finally:
            self.accelerator = accelerator

    def _track_num_input_tokens(self: Any, inputs: Any) -> None:
        """Count the tokens that all processes have read alike once."""
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)  # type: ignore[misc]
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self.args.world_size


class BatchSize:
    """How many samples an optimizer step has; a run that is resumed with another number goes another way.

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
                "The checkpoint's run had %d samples in an optimizer step, this one has %d and will differ: the number is "
                "processes x per_device_train_batch_size x gradient_accumulation_steps.",
                state["samples"],
                self.samples,
            )


class _Undivided:
    """Stands in for an accelerator that is to prepare a data loader, and leaves it whole for every process."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def prepare(self, loader: Any) -> Any:
        """Prepare a data loader as for a single process."""
        own = self._accelerator
        loader.worker_init_fn = partial(seed_worker, num_workers=loader.num_workers, rank=0)  # the same augmentation
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


def fingerprint(inputs: Mapping[str, Any]) -> int:
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
