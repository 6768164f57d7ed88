"""Tiny models of images and texts: real architectures with random weights, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)

from tests.helpers.tiny import SIZES, VOCABULARY, generator

KINDS = ("clip", "siglip", "dual")
TOKENS = 6
LORA = {
    "clip": ["q_proj", "v_proj"],
    "siglip": ["q_proj", "v_proj"],
    "dual": ["q_proj", "v_proj", "query", "value"],
}


def pair_model(kind: str, seed: int = 0, positions: int = TOKENS) -> nn.Module:
    """Build a tiny model of a kind in `KINDS`, without touching the global generator."""
    image = {"image_size": 8, "patch_size": 4, **SIZES}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": positions, **SIZES}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "clip":
            text |= {"eos_token_id": VOCABULARY - 1, "bos_token_id": 0, "pad_token_id": 1}
            config = CLIPConfig(
                text_config=text, vision_config=image, projection_dim=12, logit_scale_init_value=1.0
            )
            model: nn.Module = CLIPModel(config)
        elif kind == "siglip":
            model = SiglipModel(SiglipConfig(text_config=text, vision_config=image))
            model.logit_scale.data.fill_(1.0)
            model.logit_bias.data.fill_(-1.0)
        else:
            towers = ViTModel(ViTConfig(**image)), BertModel(BertConfig(**text))
            options = {"projection_dim": 12, "logit_scale_init_value": 1.0}
            both = VisionTextDualEncoderConfig.from_vision_text_configs(
                towers[0].config, towers[1].config, **options
            )
            model = VisionTextDualEncoderModel(
                config=both, vision_model=towers[0], text_model=towers[1]
            )
        for parameter in model.parameters():  # some start so small that nothing depends on them
            if parameter.dim() > 1:
                parameter.data += 0.2 * torch.randn(parameter.shape)
    return model.eval()


def pair_batch(images: int = 4, texts: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Draw a batch of pairs, or of some images and other texts."""
    rng, texts = generator(seed), images if texts is None else texts
    ids = torch.randint(3, VOCABULARY - 1, (texts, TOKENS), generator=rng)
    ids[:, -1] = VOCABULARY - 1
    batch: dict[str, Any] = {
        "pixel_values": torch.randn(images, 3, 8, 8, generator=rng),
        "input_ids": ids,
    }
    return {**batch, "attention_mask": torch.ones_like(ids), "return_loss": True}


def as_pairs(batch: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Take a batch apart into the samples of a data set."""
    return [
        {n: v[i] for n, v in batch.items() if torch.is_tensor(v)}
        for i in range(len(batch["pixel_values"]))
    ]


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Make a batch of pairs, as the examples of transformers do."""
    return {
        **{name: torch.stack([row[name] for row in rows]) for name in rows[0]},
        "return_loss": True,
    }
