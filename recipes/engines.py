"""Engines that only answer, for a prompt before or after the text: the same model in transformers,
in ONNX Runtime or in vLLM, which takes LoRA too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from hf_flops import BlackBoxLoraModel, BlackBoxPromptModel
from hf_flops.engines import Engine, OnnxEngine, TorchEngine, VllmEngine, export_onnx
from hf_flops.trajectory.start import digest
from recipes import sums
from recipes.assets import smollm2
from recipes.prompts import Template, adapted
from recipes.vllm_server import VllmServer

ENGINES = ("torch", "onnx", "onnx-int8", "vllm")


@contextmanager
def running(recipe: Any, folder: str | Path) -> Iterator[Any]:
    """Give the recipe with the address of a vLLM server, which runs inside the context if none was
    named.
    """
    if recipe.engine != "vllm" or recipe.engine_url:
        yield recipe
        return
    with VllmServer(recipe.model or smollm2(), Path(folder, "vllm.log")) as server:
        yield replace(recipe, engine_url=server.url, engine_model=server.name)


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
    adapters = ("suffix", "prompt", "lora") if recipe.engine == "vllm" else ("suffix", "prompt")
    able = recipe.engine in ("torch", "vllm") and recipe.adapter != "prompt"
    if recipe.domain == sums.DOMAIN and not able:
        raise SystemExit("--domain sums needs --engine vllm or torch, --adapter suffix or lora.")
    if recipe.engine_url and recipe.engine != "vllm":
        raise SystemExit("--engine_url is of a server: it needs --engine vllm.")
    if recipe.engine and (
        recipe.adapter not in adapters or "backprop" in recipe.compare or recipe.label_head
    ):
        wants = f"--adapter {' or '.join(adapters)}, no --label_head, and no --compare backprop"
        raise SystemExit(f"--engine {recipe.engine} only answers: it needs {wants}.")


def adapter_of(
    recipe: Any, folder: str | Path, base: Any, template: Template, words: list[int] | None
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
    if recipe.engine == "vllm":
        key = os.environ.get("VLLM_API_KEY")
        options = {"api_key": key, "batch_rows": 64, "concurrency": 16, "timeout": 600.0}
        engine: Any = VllmEngine(recipe.engine_url, recipe.engine_model, **options)
    else:
        engine = engine_of(recipe.engine, base, Path(folder))
    if recipe.adapter == "lora":
        names = ["q_proj", "v_proj"]
        rank = {"r": recipe.lora_rank, "lora_alpha": 2 * recipe.lora_rank}
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=names, **rank)
        return BlackBoxLoraModel(engine, base.config, lora, words)
    tokens = (
        template.tokenizer(recipe.init_text or "", add_special_tokens=False)["input_ids"] or None
    )
    embeddings = base.get_input_embeddings().weight
    precision = 3e-2 if recipe.engine == "onnx-int8" else 1e-4
    after = recipe.adapter == "suffix"
    return BlackBoxPromptModel(
        engine, embeddings, words, recipe.virtual_tokens, tokens, precision, after
    )
