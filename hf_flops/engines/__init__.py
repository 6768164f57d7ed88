"""Engines, models that only return outputs: a callable, transformers, ONNX Runtime, vLLM.

An engine is anything that maps `inputs_embeds` (R, T, D) float32, `attention_mask` (R, T) int64,
padded at the right, and C tokens to the scores (R, C) of these tokens as what follows each row.
"""

from .base import Engine
from .http import Account
from .local import OnnxEngine, TorchEngine, export_onnx
from .vllm import VllmEngine, VllmInProcess

__all__ = [
    "Account",
    "Engine",
    "OnnxEngine",
    "TorchEngine",
    "VllmEngine",
    "VllmInProcess",
    "export_onnx",
]
