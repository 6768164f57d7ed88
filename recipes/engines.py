"""Engines that only answer, for a prompt before or after the text: the same model in transformers
or in ONNX Runtime.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from hf_flops import BlackBoxPromptModel
from hf_flops.engines import Engine, OnnxEngine, TorchEngine, export_onnx
from hf_flops.trajectory.start import digest
from recipes.prompts import Template, adapted

ENGINES = ("torch", "onnx", "onnx-int8")


def engine_of(kind: str, model: Any, folder: Path) -> Engine:
    """Put a model into an engine; a file of ONNX is written into the folder, if there is none of
    the same weights.
    """
    if kind == "torch":
        return TorchEngine(model)
    tensors = {name: digest(tensor) for name, tensor in model.state_dict().items()}
    key = hashlib.sha256(f"{model.config.to_json_string()} {tensors}".encode()).hexdigest()[:16]
    path = folder / f"{Path(model.config.name_or_path).name}-{key}.{kind}.onnx"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        export_onnx(model, path, int8=kind == "onnx-int8")
    return OnnxEngine(path, threads=torch.get_num_threads())


def check(recipe: Any) -> None:
    """Refuse an engine for what it cannot do.

    Raises:
        SystemExit: the recipe asks for such.
    """
    if recipe.engine and (
        recipe.adapter not in ("suffix", "prompt")
        or "backprop" in recipe.compare
        or recipe.label_head
    ):
        wants = "--adapter suffix or prompt, no --label_head, and no --compare backprop"
        raise SystemExit(f"--engine {recipe.engine} only answers: it needs {wants}.")


def adapter_of(
    recipe: Any, folder: str | Path, base: Any, template: Template, words: list[int]
) -> Any:
    """Put what the prompt recipe tunes on a model, or before or after the texts that an engine
    continues.
    """
    if not recipe.engine:
        sizes = {
            name: getattr(recipe, name)
            for name in ("virtual_tokens", "init_text", "lora_rank", "label_head")
        }
        return adapted(recipe.adapter, base, template, words, **sizes)
    tokens = template.tokenizer(recipe.init_text, add_special_tokens=False)["input_ids"] or None
    embeddings = base.get_input_embeddings().weight
    precision = 3e-2 if recipe.engine == "onnx-int8" else 1e-4
    engine, after = engine_of(recipe.engine, base, Path(folder)), recipe.adapter == "suffix"
    return BlackBoxPromptModel(
        engine, embeddings, words, recipe.virtual_tokens, tokens, precision, after
    )
