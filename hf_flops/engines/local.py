"""Engines in this process: a model of transformers, and a session of ONNX Runtime."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError, EngineError


class _Next(nn.Module):
    """The logits (R, V) after each row's last real token, of a causal language model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.body, self.head = model.base_model, model.get_output_embeddings()

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.body(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return self.head(hidden[rows, attention_mask.sum(1) - 1])


class TorchEngine:
    """A causal language model of transformers as an engine.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_flops.engines import TorchEngine
        >>> config = LlamaConfig(vocab_size=40, hidden_size=64, num_hidden_layers=1)
        >>> engine = TorchEngine(LlamaForCausalLM(config))
        >>> engine(torch.rand(2, 3, 64), torch.ones(2, 3, dtype=torch.int64), [3, 7]).shape
        torch.Size([2, 2])
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self._next = _Next(model)

    @torch.no_grad()
    def __call__(
        self, inputs_embeds: Tensor, attention_mask: Tensor, token_ids: Sequence[int]
    ) -> Tensor:
        """See `Engine`."""
        weight = self.model.get_input_embeddings().weight
        logits = self._next(inputs_embeds.to(weight), attention_mask.to(weight.device))
        return logits[:, list(token_ids)].float()

    @torch.no_grad()
    def generate(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        max_tokens: int = 16,
        temperature: float = 0.0,
        **options: object,
    ) -> list[list[int]]:
        """Return the tokens that continue each row; options go to the model's `generate`."""
        weight = self.model.get_input_embeddings().weight
        order = attention_mask.argsort(dim=1, stable=True)  # padding goes to the left
        rows = inputs_embeds.gather(1, order[:, :, None].expand_as(inputs_embeds)).to(weight)
        options |= {"attention_mask": attention_mask.gather(1, order).to(weight.device)}
        options |= {"do_sample": temperature > 0, "temperature": temperature or None}
        tokens = self.model.generate(inputs_embeds=rows, max_new_tokens=max_tokens, **options)
        return tokens.tolist()


def _onnxruntime() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("Engines of ONNX need it: pip install 'hf_flops[onnx]'.") from error
    return onnxruntime


def export_onnx(model: PreTrainedModel, path: str | Path, *, int8: bool = False) -> Path:
    """Write a causal language model as an ONNX file that takes `inputs_embeds`: see `OnnxEngine`.

    Args:
        model: the model, in float32.
        path: the file to write; weights are in a second file (`.data`). Both are written only after
            a check.
        int8: whether to quantise weights to 8 bits in blocks of 32 numbers, and activations when
            they are computed, in blocks too. With a single scale, outliers would leave the other
            numbers few digits, and rows would depend on each other.

    Raises:
        ConfigurationError: the exported model does not compute what the model does.
    """
    runtime, path = _onnxruntime(), Path(path)
    model.eval()
    width = model.get_input_embeddings().get_parameter("weight").shape[1]
    embeds = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    either = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    with TemporaryDirectory(dir=path.parent, prefix=path.name) as folder:
        plain, whole = Path(folder, f"fp32-{path.name}"), Path(folder, path.name)
        plain = plain if int8 else whole  # the file contains the name of that of its weights
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from the internals of torch's exporter
            torch.onnx.export(
                _Next(model),
                (embeds, mask),
                plain,
                input_names=["inputs_embeds", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes={"inputs_embeds": either, "attention_mask": either},
                dynamo=True,
                verbose=False,
            )
            logits = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
        wanted = logits[[0, 1], [4, 2]]
        found = OnnxEngine(plain)(embeds, mask, range(wanted.shape[1]))
        error = float((found - wanted).abs().max())
        if not error <= 1e-3 * max(1.0, float(wanted.abs().max())):
            wrong = f"cannot be exported: its logits would differ by {error:.2g}"
            raise ConfigurationError(f"{type(model).__name__} {wrong}.")
        if int8:
            _quantise(runtime, plain, whole)
        path.unlink(missing_ok=True)  # an older file must not be used with the new weights
        for file in sorted(Path(folder).glob(f"{path.name}*"), reverse=True):  # weights first
            os.replace(file, path.with_name(file.name))
    return path


def _quantise(runtime: ModuleType, plain: Path, path: Path) -> None:
    """Write the 8-bit version of a file."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    module: Any = importlib.import_module(f"{runtime.__name__}.quantization.matmul_nbits_quantizer")
    root.handlers[:] = handlers  # the module configures the root logger, and logs every node
    root.setLevel(level)
    module.logger.setLevel(logging.WARNING)
    quantizer = module.MatMulNBitsQuantizer(
        str(plain), bits=8, block_size=32, is_symmetric=True, accuracy_level=4
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), False)


class OnnxEngine:
    """A session of ONNX Runtime on the CPU.

    Args:
        path: what `export_onnx` wrote.
        threads: of the session; 0 for as many as there are cores.
    """

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        runtime, self.path = _onnxruntime(), Path(path)
        options, providers = runtime.SessionOptions(), ["CPUExecutionProvider"]
        options.intra_op_num_threads = threads
        self.session = runtime.InferenceSession(str(path), options, providers)

    def __repr__(self) -> str:
        return f"OnnxEngine({str(self.path)!r})"

    def __call__(
        self, inputs_embeds: Tensor, attention_mask: Tensor, token_ids: Sequence[int]
    ) -> Tensor:
        """See `Engine`."""
        rows = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        arrays = {name: tensor.cpu().numpy() for name, tensor in rows.items()}
        try:
            (logits,) = self.session.run(["logits"], arrays)
        except Exception as error:  # ONNX Runtime has no common base class
            raise EngineError(f"{self!r} failed: {error}") from error
        return torch.from_numpy(logits)[:, list(token_ids)]
