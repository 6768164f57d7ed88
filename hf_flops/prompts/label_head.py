"""A trainable linear head over label words, in the place of a language model's output layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from accelerate.utils import align_module_device
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import PushToHubMixin

from ..base.patching import replaced_forward
from ..errors import ConfigurationError
from ..objectives.elementwise import mean_cross_entropy, widen

if TYPE_CHECKING:
    from peft import PeftModel

HEAD_FILE, ADAPTER_CONFIG = "label_head.safetensors", "adapter_config.json"


def label_head_of(model: PreTrainedModel | PeftModel, words: Sequence[int]) -> nn.Linear:
    """Return a trainable layer from hidden states (R, D) to the logits (R, C) of classes, which
    starts as the output layer's rows of the classes' words.

    Args:
        model: a causal language model.
        words: the token of each of C classes.

    Raises:
        ConfigurationError: the model has no output layer.
    """
    output = _output_layer(model)
    with align_module_device(output):  # accelerate may have offloaded it
        rows = torch.tensor(list(words), device=output.weight.device)
        weight = widen(output.weight.detach()[rows])
        bias = getattr(output, "bias", None)
        bias = None if bias is None else bias.detach()[rows]
    head = nn.utils.skip_init(
        nn.Linear, weight.shape[1], len(rows), device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(torch.zeros(len(rows)) if bias is None else bias)
    return head


def hidden_states(
    model: PreTrainedModel | PeftModel, *, when: bool = True
) -> AbstractContextManager[None]:
    """Return a context in which the model's "logits" are the inputs (R, T, D) of its output layer,
    which does not run; one that does nothing if not `when`.
    """
    if not when:
        return nullcontext()
    return replaced_forward(_output_layer(model), lambda original: lambda states: states)


def _output_layer(model: PreTrainedModel | PeftModel) -> Any:
    output = model.get_output_embeddings()
    if output is None:
        raise ConfigurationError(
            f"A {type(model).__name__} has no output layer whose rows a label head could start as: "
            "give a causal language model."
        )
    return output


class LabelHeadModel(nn.Module, PushToHubMixin):
    """A causal language model, with or without a PEFT adapter, as a classifier with a trainable
    linear head.

    With h the input of the model's output layer at a row's last token, the logits of the classes
    are `head.weight h + head.bias`. The head starts as the output layer's rows of the label words,
    so it starts with the model's own preference among these words (of models that cap their
    logits, nearly). The output layer, with a row for each of the vocabulary's words, does not
    run. `FlopsTrainer` solves the head on what clean rows show, so it gets no noise.

    Args:
        model: a causal language model of transformers, which is then frozen; or of PEFT.
        label_words: the token of each of C classes.

    Raises:
        ConfigurationError: the model has no output layer.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_flops import LabelHeadModel
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=64, num_hidden_layers=1))
        >>> adapter = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
        >>> model = LabelHeadModel(adapter, label_words=[7, 9])
        >>> model(torch.tensor([[5, 6, 3]]), labels=torch.tensor([1])).logits.shape
        torch.Size([1, 2])
    """

    label_words: Tensor
    accepts_loss_kwargs = True  # Trainer's name for `num_items_in_batch`

    def __init__(self, model: PreTrainedModel | PeftModel, label_words: Sequence[int]) -> None:
        super().__init__()
        self.head = label_head_of(model, label_words)
        plain = isinstance(model, PreTrainedModel)
        self.model: Any = model.requires_grad_(False) if plain else model
        self.register_buffer(
            "label_words", torch.tensor(list(label_words), device=self.head.weight.device)
        )
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_ignore_missing_model)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> SequenceClassifierOutput:
        """Run texts (R, T), padded on either side (on the right where virtual tokens come before
        them); labels are (R,) classes and logits (R, C).
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with hidden_states(self.model):
            states = self.model(input_ids=input_ids, attention_mask=mask).logits
        # from the end, because virtual tokens come first
        last = -1 - mask.flip(1).long().argmax(1)
        rows = torch.arange(len(last), device=last.device)
        logits = self.head(states[rows, last].to(self.head.weight.dtype))
        if labels is None:
            return SequenceClassifierOutput(logits=logits)
        loss = mean_cross_entropy(logits, labels, num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def save_pretrained(self, save_directory: str | Path, **options: object) -> None:
        """Write the adapter as PEFT does, and the head beside it; the base model is not written."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if not isinstance(self.model, PreTrainedModel):
            self.model.save_pretrained(str(folder), **options)
        own = {"label_words": self.label_words, **self.head.state_dict()}
        save_file({name: value.contiguous() for name, value in own.items()}, folder / HEAD_FILE)

    @classmethod
    def from_pretrained(cls, model: PreTrainedModel, folder: str | Path, **options: Any) -> Self:
        """Load head and adapter from `save_pretrained`, for a base model; options of
        `PeftModel.from_pretrained`.
        """
        state = load_file(Path(folder, HEAD_FILE))
        adapted: PreTrainedModel | PeftModel = model
        if Path(folder, ADAPTER_CONFIG).is_file():
            from peft import PeftModel

            adapted = PeftModel.from_pretrained(model, str(folder), **options)
        loaded = cls(adapted, state.pop("label_words").tolist())
        loaded.head.load_state_dict(state)
        return loaded


def _drop_frozen(
    module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object
) -> None:
    """Take out of a state dict what is not trained: it is the base model's, and large."""
    del metadata
    kept = {prefix + name for name, value in module.named_parameters() if value.requires_grad}
    for name in [name for name in state if name.startswith(f"{prefix}model.")]:
        if name not in kept:
            del state[name]


def _ignore_missing_model(module: nn.Module, keys: Any) -> None:
    """Take the base model's weights out of what a state dict lacks."""
    del module
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.startswith("model.")]
