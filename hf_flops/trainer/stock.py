"""Overrides of the stock trainer's private methods, for ids, checkpoints and processes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer_utils import has_length, rotate_checkpoints

from ..autotune.first_batch import held_back
from ..autotune.protocol import Stateful
from ..base.batch import Inputs
from ..distributed.collectives import ProcessGroup
from ..reporting.callbacks import RunCosts
from ..reporting.model_card import complete_card, plain_card
from .batches import SAMPLE_ID, without_ids
from .checkpoint_state import STATE_FILE, damage_named, load_state, read_json, save_state
from .checkpoints import CheckpointWriter, generator_states, rerooted
from .integrity import STATE
from .multiprocess import undivided_loader
from .offload import device_map_hidden, is_offloaded
from .parts import STREAM, OutsideParameters, StreamPosition
from .private_arguments import private
from .settings import run_as_code
from .sharding import reshard

if TYPE_CHECKING:
    _Base = Trainer  # so that `self` is typed
else:
    _Base = object


class StockOverrides(_Base):
    """Takes sample ids out of the inputs, saves our parts, and divides no batch.

    Attributes:
        checkpoint_writer: publishes checkpoints.
        sample_ids: (B,) of the batch that was prepared last, if it has any.
    """

    model: nn.Module
    args: Any  # of a class with `FlopsArgumentsMixin`
    checkpoint_writer: CheckpointWriter
    costs: RunCosts
    sample_ids: tuple[int, ...] | None = None
    stream: StreamPosition
    _group: ProcessGroup | None = None
    _parts: Callable[[], Mapping[str, Stateful]]
    _begin: Callable[[], None]

    @property
    def group(self) -> ProcessGroup:
        """The processes of the run."""
        assert self._group is not None
        return self._group

    @property
    def _whole(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    def _hp_search_setup(self, trial: object) -> None:
        super()._hp_search_setup(trial)
        if trial is not None:
            self._begin()  # `train` has begun with the arguments before this trial's

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs, self.sample_ids = without_ids(inputs)
        return super()._prepare_inputs(inputs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns or []
        features = getattr(self.train_dataset, "features", None) or {}
        text = getattr(features.get(SAMPLE_ID), "dtype", None) in ("string", "large_string")
        if SAMPLE_ID not in columns and not text:
            columns.append(SAMPLE_ID)

    def create_model_card(self, *positional: Any, **options: Any) -> None:
        """Write the stock card, with our sections and tags beside those of model and caller."""
        if isinstance(self.model, (PreTrainedModel, PeftModel)):
            super().create_model_card(*positional, **options)
        elif self.is_world_process_zero():
            plain_card(self.args.output_dir, self.model)
        if self.is_world_process_zero():
            folder, data, tags = self.args.output_dir, self.train_dataset, options.get("tags")
            settings, costs = run_as_code(self.args, self.model), self.costs.so_far()
            frozen = held_back(self.model, self.args.lora_parts, progress=1.0)
            complete_card(folder, settings, self.model, costs, tags, data, frozen)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save as the stock trainer does."""
        reshard(self.model)
        super().save_model(*args, **kwargs)

    def save_state(self) -> None:
        """Save the trainer's state as the stock trainer does, and that of our parts beside it."""
        super().save_state()
        if self.args.should_save:
            save_state(self.args.output_dir, self._parts())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_state(output_dir, self._parts())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with damage_named(Path(checkpoint or "")):
            super()._load_optimizer_and_scheduler(checkpoint)
        load_state(checkpoint, self._parts())

    def _init_training_state(self, *args: object, **kwargs: object) -> tuple[int, int]:
        given = inspect.signature(super()._init_training_state).bind(*args, **kwargs).arguments
        begin: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        if (checkpoint := given["resume_from_checkpoint"]) is not None:
            saved = TrainerState.load_from_json(os.path.join(checkpoint, STATE))
            run = self._get_output_dir(given["trial"])
            best = rerooted(saved.best_model_checkpoint, checkpoint, run)
            self.state.best_model_checkpoint = best
            if not has_length(self.train_dataset):
                begin = self._stream_position(checkpoint) or begin
        return begin

    def _stream_position(self, checkpoint: str) -> tuple[int, int] | None:
        """Return the epoch of a checkpoint, and its batches to skip; None for a stock one's."""
        path = Path(checkpoint, STATE_FILE)
        if not path.is_file() or STREAM not in read_json(path):
            return None
        load_state(checkpoint, {STREAM: self.stream})
        steps = 0 if self.args.ignore_data_skip else self.state.global_step - self.stream.begun
        return max(self.stream.epoch, 0), steps * self.args.gradient_accumulation_steps

    def get_total_train_batch_size(self, args: Any) -> int:
        """Return the samples of an optimizer step; the stock count overlooks `split_batches`."""
        samples = super().get_total_train_batch_size(args)
        return samples // args.world_size if self.accelerator.split_batches else samples

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not OutsideParameters(model or self._whole).load_from(resume_from_checkpoint):
            with damage_named(Path(resume_from_checkpoint)), device_map_hidden(self.model):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best, folder = OutsideParameters(self._whole), str(self.state.best_model_checkpoint)
        if not best.load_from(folder):
            with damage_named(Path(folder)), device_map_hidden(self.model):
                super()._load_best_model()
            best.load_from(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with private(self.args, output_dir or self.args.output_dir):
            super()._save(output_dir, state_dict)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        named = damage_named(Path(checkpoint or ""))
        with named, generator_states(checkpoint, self.args) as folder:
            super()._load_rng_state(folder)

    def _get_output_dir(self, trial: object) -> str:
        return self.checkpoint_writer.folder(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        run = Path(self._get_output_dir(trial))
        with self.checkpoint_writer.whole(run, self.args, self.state, self.group) as folder:
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            rotate_checkpoints(
                str(run),
                self.args.save_total_limit,
                self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.checkpoint_writer.saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _wrap_model(
        self, model: nn.Module, training: bool = True, dataloader: DataLoader | None = None
    ) -> nn.Module:
        stays = model is self.model and is_offloaded(model)
        if stays or (training and model is self.model and self.args.world_size > 1):
            # without DistributedDataParallel, which would wait for a backward pass
            place = False if stays else None
            with device_map_hidden(model):
                return self.accelerator.prepare_model(model, place, evaluation_mode=True)
        return super()._wrap_model(model, training, dataloader)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not is_offloaded(model):
            super()._move_model_to_device(model, device)

    def _get_dataloader(self, *args: object, **kwargs: object) -> DataLoader:
        return undivided_loader(self, super()._get_dataloader, args, kwargs)

    def _track_num_input_tokens(self, inputs: Inputs) -> None:
        """Count the tokens that all processes have read alike once."""
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        counted = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + counted // self.args.world_size
