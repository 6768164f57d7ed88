"""What `scripts/gpu-check` measures: models with random weights, the rows per second of a step
against plain inference and MeZO, memory, waits for the device, and where time goes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from cases import Case, lora  # isort: skip
from throughput import measure  # isort: skip
from hf_flops.base.memory import PeakMemory  # isort: skip
from hf_flops.base.transfer import synchronise  # isort: skip

LLAMA = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
    },
    "Llama 1B": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
    },
    "Llama 7B": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
    },
}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 128,
}


@contextmanager
def built_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Return a context in which models are made on a device and in a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def adapted(model: nn.Module, names: list[str], device: torch.device, **options: Any) -> nn.Module:
    """Put LoRA of rank 8 in all layers, B away from zero as in training."""
    return lora(model, None, names, **options).to(device)


def vit(device: torch.device, dtype: torch.dtype, small: bool) -> Case:
    """ViT-B/16 with random weights, 16 images, 256 rows; a quarter of them if it is small."""
    samples = 4 if small else 16
    sizes = {**TINY, "image_size": 32} if small else {}
    sizes = {k: v for k, v in sizes.items() if k not in ("vocab_size", "num_key_value_heads")}
    config = ViTConfig(num_labels=10, **sizes)
    with built_on(device, dtype):
        model = ViTForImageClassification(config)
        pixels = torch.randn(samples, 3, config.image_size, config.image_size)
    labels = (torch.arange(samples) % 10).to(device)
    inputs = {"pixel_values": pixels, "labels": labels}
    model = adapted(model, ["q_proj", "v_proj"], device)
    return Case("ViT-B/16", model, inputs, 32 if small else 128)


def llama(name: str, device: torch.device, dtype: torch.dtype, small: bool) -> Case:
    """Return a Llama with random weights, 16 texts of 64 tokens, 256 rows; see `vit`."""
    config = LlamaConfig(**(TINY if small else LLAMA[name]))
    with built_on(device, dtype):
        model = LlamaForCausalLM(config)
    ids = torch.randint(3, config.vocab_size, (4, 8) if small else (16, 64)).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = adapted(model, every, device, task_type="CAUSAL_LM")
    return Case(name, model, inputs, 32 if small else 64)


def chosen(case: Case, sides: Sequence[str]) -> dict[str, Callable[[], None]]:
    """Return what runs a step, for some sides."""
    methods = case.methods()
    return {side: methods[side] for side in sides}


def examined(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Measure a case: rows per second of all sides, memory, waits of a step, where time goes."""
    methods = chosen(case, ("plain", "ours", "mezo"))
    found, step = measure(case, repeats, methods), methods["ours"]
    memory = {}
    for side, run in (("plain", case.plain), ("ours", step)):
        with PeakMemory(device) as peak:
            run()
            synchronise(device)
        memory[side] = peak.megabytes
    return {**found, "megabytes": memory, "waits": waits(step, device), **profiled(step, device)}


def waits(step: Callable[[], None], device: torch.device) -> int | None:
    """Return how often the host waits in a step; None where torch cannot tell."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in said)


def profiled(step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Return the kernels, or operations, that take most of a step, in milliseconds."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        synchronise(device)
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events)
    top = {event.key[:60]: getattr(event, name) / 1e3 for event in events[:12]}
    return {"milliseconds": total / 1e3, "top": top, "calls": sum(e.count for e in events)}


def offloaded(device: torch.device, small: bool) -> dict[str, Any]:
    """Compare rows per second of a base in the host's memory, layer by layer on the device."""
    case = llama("Llama 1B", torch.device("cpu"), torch.bfloat16, small)
    base = case.model.get_base_model()
    frozen = [module for module in base.modules() if _is_frozen_leaf(module)]
    for module in frozen:
        cpu_offload(module, execution_device=device)
    for parameter in case.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device)
    case.inputs = {name: value.to(device) for name, value in case.inputs.items()}
    found = measure(case, 1, chosen(case, ("plain", "ours")))
    for module in frozen:
        remove_hook_from_submodules(module)
    return found


def _is_frozen_leaf(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and not any(parameter.requires_grad for parameter in own)
