"""The methods of the installed PEFT, and a configuration of each for tiny models."""

from __future__ import annotations

from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from tests.helpers.tiny import TASKS

KINDS = {"vit": "ViT", "bert": "BERT, classification", "llama": "Llama"}
TARGETS = {"vit": ["q_proj", "v_proj"], "bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
EMBEDDINGS = {"vit": "projection", "bert": "word_embeddings", "llama": "embed_tokens"}
PROMPTS = {"num_virtual_tokens": 3}
# What the tiny models (16 wide) need beside the defaults; {} where those do.
OPTIONS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 2},
    "ADALORA": {"init_r": 3, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 1},
    "ADAMSS": {"r": 4, "num_subspaces": 2},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1, "target_modules": None},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "CARTRIDGE": PROMPTS,
    "CPT": {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]},
    "FOURIERFT": {"n_frequency": 8},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "IA3": {"feedforward_modules": []},
    "LOHA": {"r": 2},
    "LOKR": {"r": 2},
    "LN_TUNING": {"target_modules": r".*(norm|layernorm\w*|LayerNorm)"},
    "MISS": {"r": 2},
    "MULTITASK_PROMPT_TUNING": {**PROMPTS, "num_tasks": 2},
    "OFT": {"oft_block_size": 4, "use_cayley_neumann": False},
    "PREFIX_TUNING": PROMPTS,
    "PROMPT_TUNING": PROMPTS,
    "PSOFT": {"r": 4},
    "P_TUNING": {**PROMPTS, "encoder_hidden_size": 8},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHADOW": {"target_modules": None, "r": 2},
    "SHIRA": {"r": 2},
    "TINYLORA": {"u": 4},
    "UNILORA": {"theta_d_length": 16},
    "VBLORA": {"vector_length": 4, "num_vectors": 8},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 8},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "LORA on all linear layers": ("LORA", {"r": 2, "target_modules": "all-linear"}),
    "LORA, DoRA": ("LORA", {"r": 2, "use_dora": True}),
    "LORA on embeddings": ("LORA", {"r": 2, "target_modules": "embeddings"}),
    "LORA, DoRA on embeddings": (
        "LORA",
        {"r": 2, "use_dora": True, "target_modules": "embeddings"},
    ),
    "LORA with trainable tokens": ("LORA", {"r": 2, "trainable_token_indices": [5, 6]}),
    "PREFIX_TUNING with projection": (
        "PREFIX_TUNING",
        {**PROMPTS, "prefix_projection": True, "encoder_hidden_size": 8},
    ),
}
TEXT_ONLY = {
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "TRAINABLE_TOKENS",
}


def methods() -> list[tuple[str, str, dict[str, Any]]]:
    """List (row, PEFT type, options) for every method of the release."""
    plain = [(kind.value, kind.value, OPTIONS.get(kind.value, {})) for kind in peft.PeftType]
    variants = [(name, kind, options) for name, (kind, options) in VARIANTS.items()]
    return sorted(plain + variants)


def configure(kind: str, name: str, options: dict[str, Any]) -> Any:
    """Build the configuration of a method for a model."""
    kwargs = dict(options)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]
    fields = config.__dataclass_fields__
    if "target_modules" in fields:
        targets = kwargs.setdefault("target_modules", TARGETS[kind])
        if targets == "embeddings":
            kwargs["target_modules"] = [EMBEDDINGS[kind]]
        if name == "TRAINABLE_TOKENS":
            kwargs |= {"target_modules": [EMBEDDINGS[kind]], "token_indices": [5, 6]}
    if "trainable_token_indices" in kwargs:
        kwargs["trainable_token_indices"] = {EMBEDDINGS[kind]: [5, 6]}
    return config(task_type=TASKS[kind], **kwargs)
