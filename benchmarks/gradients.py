"""Gradients of single samples, as ground truth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_flops.objectives import RowLosses, TappedLoss
from hf_flops.perturbations import ParameterVector


class SampleGradients:
    """Gradients of single samples by one backward pass, for models whose trainable parameters are
    those of Linear layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.vector = model, ParameterVector.of(model)
        index = {id(parameter): i for i, parameter in enumerate(self.vector.parameters)}
        self.sites = {
            module: {
                name: index[id(p)]
                for name, p in module._parameters.items()
                if p is not None and id(p) in index
            }
            for module in model.modules()
            if isinstance(module, nn.Linear)
            and any(id(p) in index for p in module._parameters.values())
        }
        assert sum(len(names) for names in self.sites.values()) == len(self.vector.names)

    def __call__(self, inputs: dict[str, Tensor]) -> tuple[Tensor, RowLosses]:
        """Return (B, d) gradients of each sample's loss, and the losses; the mean gradient is left
        in `.grad`.
        """
        rows, kept = torch.zeros(len(inputs["labels"]), self.vector.size), []

        def forward(inputs: Any) -> tuple[Tensor, Any]:
            outputs = self.model(**inputs)
            kept.append(outputs.loss)
            return outputs.loss, outputs

        with self._watched(self.vector.views(rows)):
            losses = TappedLoss()(forward, inputs, features=True)
            kept[0].backward()
        rows *= len(rows)  # the loss is the mean over samples
        return rows, RowLosses(losses.sums.detach(), losses.counts, losses.residuals.detach())

    @contextmanager
    def _watched(self, views: list[Tensor]) -> Iterator[None]:
        def forward(module: nn.Module, args: tuple, out: Tensor) -> None:
            x = args[0].detach().reshape(len(views[0]), -1, args[0].shape[-1])

            def backward(slope: Tensor) -> None:
                slope = slope.reshape(len(x), -1, slope.shape[-1])
                for name, i in self.sites[module].items():
                    views[i].copy_(slope.transpose(1, 2) @ x if name == "weight" else slope.sum(1))

            out.register_hook(backward)

        handles = [module.register_forward_hook(forward) for module in self.sites]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
