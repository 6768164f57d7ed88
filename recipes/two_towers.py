"""The models of the alignment recipe: two encoders made one, those of the Hub that have two towers,
and what is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    PreTrainedModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging as transformers_logging

from hf_flops import ConfigurationError, VisualPrompt

ADAPTERS = ("lora", "border", "tokens", "context", "none")
TOWERS = {"image": "vision_model", "text": "text_model", "both": "(vision_model|text_model)"}


class Pooled(nn.Module):
    """An encoder whose pooled output is its first token, or the mean of its real ones; for models
    without a trained pooler.

    A frozen text encoder remembers what it made of a sentence.

    Args:
        encoder: returns `last_hidden_state` (R, T, D), or (R, D, H, W).
        pooling: "first" or "mean".
    """

    def __init__(self, encoder: PreTrainedModel, pooling: str) -> None:
        super().__init__()
        self.encoder, self.pooling, self.config = encoder, pooling, encoder.config
        self._known: dict[bytes, Tensor] = {}

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPooling:
        """Return the pooled hidden state (R, D)."""
        if input_ids is None:
            pooled = self._pooled({"pixel_values": pixel_values}, None)
        elif attention_mask is None or any(
            parameter.requires_grad for parameter in self.encoder.parameters()
        ):
            given = {"input_ids": input_ids, "attention_mask": attention_mask}
            pooled = self._pooled(
                {name: value for name, value in given.items() if value is not None}, attention_mask
            )
        else:
            pooled = self._remembered(input_ids, attention_mask)
        return BaseModelOutputWithPooling(
            last_hidden_state=pooled.unsqueeze(1), pooler_output=pooled
        )

    def _pooled(self, given: dict[str, Any], mask: Tensor | None) -> Tensor:
        hidden = self.encoder(**given).last_hidden_state
        if hidden.dim() == 4:
            return hidden.mean((2, 3))
        if self.pooling == "first":
            return hidden[:, 0]
        weights = (
            torch.ones_like(hidden[..., :1]) if mask is None else mask.unsqueeze(-1).to(hidden)
        )
        return (hidden * weights).sum(1) / weights.sum(1)

    @torch.no_grad()
    def _remembered(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        keys = [
            row[kept].numpy().tobytes()
            for row, kept in zip(input_ids.cpu(), attention_mask.cpu().bool(), strict=True)
        ]
        new = [index for index, key in enumerate(keys) if key not in self._known]
        if new:
            # a frozen encoder has no use for dropout
            training, _ = self.encoder.training, self.encoder.eval()
            found = self._pooled(
                {"input_ids": input_ids[new], "attention_mask": attention_mask[new]},
                attention_mask[new],
            )
            self.encoder.train(training)
            self._known.update(
                (keys[index], row.clone()) for index, row in zip(new, found, strict=True)
            )
        return torch.stack([self._known[key] for key in keys])


def dual_encoder(vision: str, text: str, dimension: int, seed: int) -> VisionTextDualEncoderModel:
    """Put new projections on any two encoders: the first token of the images, the mean of the
    texts' tokens.
    """
    verbosity = transformers_logging.get_verbosity()
    # the loading report presents heads that are left out as a fault
    transformers_logging.set_verbosity_error()
    try:
        towers = [
            Pooled(_encoder(path), pooling) for path, pooling in ((vision, "first"), (text, "mean"))
        ]
    finally:
        transformers_logging.set_verbosity(verbosity)
    configs = (tower.config for tower in towers)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        *configs, projection_dim=dimension
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTextDualEncoderModel(config, *towers).eval()


def _encoder(path: str) -> PreTrainedModel:
    try:
        return AutoModel.from_pretrained(path, add_pooling_layer=False)
    except TypeError:
        return AutoModel.from_pretrained(path)


def load_processor(path: str) -> Any:
    """Load a model's image processor.

    Raises:
        ConfigurationError: it has none.
        OSError, ValueError: there is no such model.
    """
    try:
        return AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        AutoConfig.from_pretrained(path)  # says what is wrong with a model that is not there
        raise ConfigurationError(
            f"{path!r} has no image processor (preprocessor_config.json), so what its images "
            "should look like is unknown: name a model that has one with --image_processor."
        ) from error


def text_shape(model: str) -> tuple[int, bool | str]:
    """Return the most tokens that a text of a model may have, and how shorter ones are filled up:
    SigLIP needs full length.

    Raises:
        ConfigurationError: the model is not one of images and texts.
    """
    config = AutoConfig.from_pretrained(model)
    if not hasattr(config, "vision_config") or not hasattr(config, "text_config"):
        raise ConfigurationError(
            f"{model!r} has no two towers: name its kind of encoder with --vision_model or "
            "--text_model."
        )
    longest = min(config.text_config.max_position_embeddings, 77)
    return longest, "max_length" if config.model_type.startswith("siglip") else True


def trained_context(tokenizer: Any, size: int) -> tuple[int, ...]:
    """Return the tokens that a trained context is made of: the last ordinary ones of the
    vocabulary, which are rare.
    """
    special = set(tokenizer.all_special_ids)
    return tuple(
        [token for token in range(tokenizer.vocab_size - 1, -1, -1) if token not in special][:size]
    )


def adapted(
    model: Any,
    adapter: str,
    *,
    projections: bool,
    towers: str = "image",
    rank: int = 2,
    size: int = 4,
    context: tuple[int, ...] = (),
) -> nn.Module:
    """Make what is to be trained of a model trainable, and nothing else.

    Args:
        model: with two towers.
        adapter: LoRA (its B matrices), a visual prompt of a kind, a context of texts, or "none"
            beside projections.
        projections: whether to train what projects the embeddings as well.
        towers: where LoRA is: "image", "text" or "both".
        rank: of LoRA.
        size: of a visual prompt.
        context: tokens whose embeddings are trained.

    Raises:
        ConfigurationError: the adapter or the towers are unknown.
    """
    for what, value, known in (("adapter", adapter, ADAPTERS), ("tower", towers, TOWERS)):
        if value not in known:
            raise ConfigurationError(
                f"The {what} {value!r} is unknown: choose among {', '.join(known)}."
            )
    model.requires_grad_(False)
    heads = ["visual_projection", "text_projection"] if projections else []
    if adapter in ("border", "tokens"):
        model.vision_model = VisualPrompt(model.vision_model, adapter, size)
    elif adapter == "context":
        name = next(
            name
            for name, module in model.text_model.named_modules()
            if isinstance(module, nn.Embedding)
        )
        model = get_peft_model(
            model,
            TrainableTokensConfig(token_indices=[*context], target_modules=[name.split(".")[-1]]),
        )
    elif adapter == "lora":
        layers = rf".*{TOWERS[towers]}.*\.(q_proj|v_proj|query|value|q_lin|v_lin)"
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=layers, modules_to_save=heads or None
        )
        model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        head = (
            adapter != "lora"
            and bool(heads)
            and name.endswith(tuple(f"{head}.weight" for head in heads))
        )
        parameter.requires_grad_(head or (parameter.requires_grad and "lora_A" not in name))
    return model
