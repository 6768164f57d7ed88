"""Engines, models that only return outputs: a callable, an ONNX Runtime session, a server.

An engine is anything that maps `inputs_embeds` (R, T, D) float32 and `attention_mask` (R, T) int64,
padded at the right, to the logits (R, V) of what follows each row's last real token.
"""

from .client import Account, HttpEngine
from .local import OnnxEngine, TorchEngine, export_onnx
from .model import BlackBoxPromptModel, Engine
from .server import EngineServer

__all__ = [
    "Account",
    "BlackBoxPromptModel",
    "Engine",
    "EngineServer",
    "HttpEngine",
    "OnnxEngine",
    "TorchEngine",
    "export_onnx",
]
