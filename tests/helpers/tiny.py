"""Tiny models and batches: real architectures with random weights, small enough for a property
test.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_flops import FlopsArgumentsMixin, FlopsTrainingArguments

SIZES: dict[str, int] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "initializer_range": 0.3,  # large weights, so that every tensor matters
}
VOCABULARY, CLASSES, TOKENS = 40, 3, 7
TASKS = {
    "vit": None,
    "bert": "SEQ_CLS",
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "opt": "CAUSAL_LM",
    "t5": "SEQ_2_SEQ_LM",
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_model(kind: str, seed: int = 0, **options: Any) -> nn.Module:
    """Build a tiny model of a kind in `TASKS`, without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(kind, options).eval()


def _build(kind: str, options: dict[str, Any]) -> nn.Module:
    if kind == "vit":
        sizes = {"image_size": 8, "patch_size": 4, "num_labels": CLASSES, **SIZES, **options}
        return ViTForImageClassification(ViTConfig(**sizes))
    if kind == "bert":
        return BertForSequenceClassification(
            BertConfig(vocab_size=VOCABULARY, num_labels=CLASSES, **{**SIZES, **options})
        )
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **{**SIZES, **options}))
    if kind == "gpt2":
        config = {"n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3, **options}
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **config))
    if kind == "opt":
        sizes = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 20,
            "init_std": 0.3,
        }
        return OPTForCausalLM(
            OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=16, **{**sizes, **options})
        )
    sizes = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 20,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    }
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **{**sizes, **options}))


def tiny_batch(kind: str, samples: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Draw a batch for a model of a kind in `TASKS`; texts have uneven lengths where the labels
    allow it.
    """
    rng = generator(seed)
    if kind == "vit":
        pixels = torch.randn(samples, 3, 8, 8, generator=rng)
        return {"pixel_values": pixels, "labels": torch.randint(CLASSES, (samples,), generator=rng)}
    ids = torch.randint(3, VOCABULARY, (samples, TOKENS), generator=rng)
    lengths = torch.randint(3, TOKENS + 1, (samples, 1), generator=rng)
    mask = (torch.arange(TOKENS) < lengths).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind == "bert":
        return {**batch, "labels": torch.randint(CLASSES, (samples,), generator=rng)}
    if kind == "t5":
        return {**batch, "labels": torch.randint(3, VOCABULARY, (samples, 4), generator=rng)}
    return {**batch, "labels": torch.where(mask.bool(), ids, -100)}


def double(inputs: dict[str, Any]) -> dict[str, Any]:
    """Convert the floating-point tensors of a batch or a sample to float64, for models in
    float64.
    """
    return {
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in inputs.items()
    }


def as_dataset(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Take a batch apart into the samples that a Trainer's data set holds."""
    return [{name: value[i] for name, value in batch.items()} for i in range(len(batch["labels"]))]


def model_forward(model: nn.Module):
    """Return the function that objectives call to run a model."""

    def forward(inputs):
        outputs = model(**inputs)
        return outputs.loss, outputs

    return forward


def training_arguments(folder: Any, kind: Any = FlopsTrainingArguments, **options: Any) -> Any:
    """Return training arguments that are quiet, save nothing and draw nothing, unless told
    otherwise.
    """
    quiet = {
        "output_dir": str(folder),
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if issubclass(kind, FlopsArgumentsMixin):
        quiet["pictures"] = False
        quiet["lora_parts"] = "both"  # that A is trained too is harder to get right
    return kind(**{**quiet, **options})
