"""Engines, models that only return outputs: a callable, transformers, ONNX Runtime, vLLM."""

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
