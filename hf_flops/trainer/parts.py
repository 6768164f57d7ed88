"""The parts of a run whose states a checkpoint holds beside the stock trainer's files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..autotune.protocol import Stateful
from ..base.state import State, tensor, whole
from ..errors import ConfigurationError
from .checkpoint_state import STATE_FILE, load_state, read_json
from .multiprocess import BatchSize
from .presets import LORA_PARTS

if TYPE_CHECKING:
    from .trainer import FlopsTrainerMixin

logger = logging.getLogger("hf_flops.trainer")
PARAMETERS, STREAM = "parameters outside the adapter's file", "stream"


def parts_of(trainer: FlopsTrainerMixin) -> dict[str, Stateful]:
    """Return the parts of a run by name."""
    parts: dict[str, Stateful] = {"ledger": trainer.ledger, STREAM: trainer.stream}
    parts["batch"] = BatchSize(trainer.get_total_train_batch_size(trainer.args))
    parts |= trainer.session.parts()
    if trainer.rate_search is not None:
        parts["learning rate search"] = trainer.rate_search
    if trainer.lora_parts.automatic:
        parts["parts of LoRA"] = trainer.lora_parts
    outside = OutsideParameters(trainer.model)
    if outside.parameters:
        parts[PARAMETERS] = outside
    return {**parts, "noise guard": trainer.noise_guard}


class OutsideParameters:
    """Trained tensors that the adapter's file does not hold, such as P-tuning's encoder.

    Of prompts PEFT saves what the encoder makes, from which its weights cannot be told.

    Args:
        model: of the run.

    Attributes:
        prompts: whether the adapter is one of prompts; then all its tensors are here.
        parameters: by name.
    """

    def __init__(self, model: nn.Module) -> None:
        configurations: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
        self.prompts = any(each.is_prompt_learning for each in configurations.values())
        saved: set[int] = set()
        if configurations and not self.prompts:
            from peft import get_peft_model_state_dict

            for name in configurations:
                state = get_peft_model_state_dict(
                    model, adapter_name=name, save_embedding_layers=False
                )
                saved |= {value.data_ptr() for value in state.values()}
        self.parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if configurations and parameter.requires_grad and parameter.data_ptr() not in saved
        }

    def state_dict(self) -> State:
        """Return the tensors."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def load_state_dict(self, state: State) -> None:
        """Take up a state from `state_dict`."""
        if state.keys() != self.parameters.keys():
            raise ValueError(f"the tensors are {sorted(state)}, not {sorted(self.parameters)}")
        values = {
            name: tensor(state[name], *parameter.shape)
            for name, parameter in self.parameters.items()
        }
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def load_from(self, folder: str) -> bool:
        """Load the tensors of a checkpoint; return whether these are all that the adapter has.

        Raises:
            ConfigurationError: the checkpoint lacks them, and cannot be resumed without.
        """
        path = Path(folder, STATE_FILE)
        if path.is_file() and PARAMETERS in read_json(path):
            load_state(folder, {PARAMETERS: self})
            return self.prompts
        if self.prompts and len(self.parameters) > 1:
            raise ConfigurationError(
                f"{folder} holds the prompts that these trained tensors make, not themselves: "
                f"{', '.join(self.parameters)}. A stock Trainer does not save them: start anew."
            )
        return False


class LoraParts:
    """Decides which matrices of LoRA a run trains, where the arguments leave it to the adapter.

    While `lora_B` is zero, the loss does not depend on `lora_A`, whose noise would carry no signal.

    Args:
        trainer: of the run, before training; it gets arguments of its own, in which "auto" has
            become "B" or "both", if there is LoRA to train.

    Attributes:
        automatic: whether this decided.
    """

    def __init__(self, trainer: FlopsTrainerMixin) -> None:
        matrices = [
            parameter
            for name, parameter in trainer.model.named_parameters()
            if ".lora_B." in name and parameter.requires_grad
        ]
        self.automatic = bool(matrices) and trainer.args.lora_parts == "auto"
        self.args = trainer.args
        if not self.automatic:
            return
        trainer.args = self.args = copy(trainer.args)  # the user may give them to other trainers
        trained = any(bool(matrix.any()) for matrix in matrices)
        self.args.lora_parts = "both" if trained else "B"
        if not trained:
            logger.info("lora_B is zero, so lora_A is not trained: lora_parts='B'.")

    def state_dict(self) -> State:
        """Return what was decided."""
        return {"parts": self.args.lora_parts}

    def load_state_dict(self, state: State) -> None:
        """Take up a state from `state_dict`: in a resumed run, `lora_B` may be nonzero."""
        if state["parts"] not in LORA_PARTS:
            raise ValueError(f"the parts of LoRA are {state['parts']!r}")
        self.args.lora_parts = state["parts"]


class StreamPosition(TrainerCallback):
    """Where a run is in a data set without a length, of which nobody knows how long an epoch is.

    Attributes:
        epoch: number of the epoch.
        begun: optimizer steps done when it began.
    """

    def __init__(self) -> None:
        self.epoch, self.begun, self._resumed = -1, 0, False

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Note where the epoch begins; a resumed run is in the middle of its first one."""
        if not self._resumed:
            self.epoch, self.begun = self.epoch + 1, state.global_step
        self._resumed = False

    def state_dict(self) -> State:
        """Return the position."""
        return {"epoch": self.epoch, "begun": self.begun}

    def load_state_dict(self, state: State) -> None:
        """Take up a state from `state_dict`."""
        self.epoch, self.begun = whole(state["epoch"], -1), whole(state["begun"])
        self._resumed = self.epoch >= 0
