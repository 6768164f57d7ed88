"""The parts of a run whose states a checkpoint holds beside the stock trainer's files."""

from __future__ import annotations

from collections.abc import Mapping
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

if TYPE_CHECKING:
    from .trainer import FlopsTrainerMixin

PARAMETERS, STREAM = "parameters outside the adapter's file", "stream"


def parts_of(trainer: FlopsTrainerMixin) -> dict[str, Stateful]:
    """Return the parts of a run by name."""
    parts: dict[str, Stateful] = {"ledger": trainer.ledger, STREAM: trainer.stream}
    parts["batch"] = BatchSize(trainer.get_total_train_batch_size(trainer.args))
    parts |= trainer.session.parts()
    if trainer.rate_search is not None:
        parts["learning rate search"] = trainer.rate_search
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
