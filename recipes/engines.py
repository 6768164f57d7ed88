"""Engines that only answer, for a prompt before or after the text: the same model in transformers or in ONNX Runtime."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hf_flops.blackbox import BlackBoxPromptModel, Engine, OnnxEngine, TorchEngine, export_onnx
from hf_flops.trajectory.start import digest
from recipes.prompts import Template

ENGINES = ("torch", "onnx", "onnx-int8")


def engine_of(kind: str, model: Any, folder: Path) -> Engine:
    """Put a model into an engine; a file of ONNX is written into the folder, if there is none of the same weights."""
    if kind == "torch":
        return TorchEngine(model)
    tensors = {name: digest(tensor) for name, tensor in model.state_dict().items()}
    key = hashlib.sha256(f"{model.config.to_json_string()} {tensors}".encode()).hexdigest()[:16]
    path = folder / f"{Path(model.config.name_or_path).name}-{key}.{kind}.onnx"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        export_onnx(model, path, int8=kind == "onnx-int8")
    return OnnxEngine(path, threads=torch.get_num_threads())


def black_box(
    kind: str,
    model: Any,
    template: Template,
    words: list[int],
    *,
    virtual_tokens: int,
    init_text: str,
    folder: Path,
    after: bool,
) -> BlackBoxPromptModel:
    """Put a prompt before or after the texts that an engine continues; it starts as `adapted` says."""
    tokens = template.tokenizer(init_text, add_special_tokens=False)["input_ids"] or None
    embeddings = model.get_input_embeddings().weight
    precision = 3e-2 if kind == "onnx-int8" else 1e-4
    engine = engine_of(kind, model, folder)
    return BlackBoxPromptModel(engine, embeddings, words, virtual_tokens, tokens, precision, after)
