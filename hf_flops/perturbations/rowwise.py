"""Separate noise for each row of a forward pass, so that all queries fit in one batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base.patching import replaced_method
from ..base.transfer import onto
from .base import ParameterVector, Perturbation
from .noise import BLOCK, RowNoise, blocks, bytes_per_row, draw
from .rules import FACTORED, Noise, RowMismatch, linear, moved_linear
from .sites import Site, find_sites
from .streams import ALL, NoiseKeys


def _factored(site: Site, noise: RowNoise, index: int) -> bool:
    """Return whether the site's rule takes the factors of a parameter's noise."""
    return noise.is_rank_one(index) and site.rule in FACTORED


def _noise_of(site: Site, noise: RowNoise, rows: slice, device: torch.device) -> Noise:
    """Return the noise of a site's parameters for some rows, in the form that its rule takes."""
    by_name: Noise = {}
    for name, index in site.tensors.items():
        if _factored(site, noise, index):
            by_name[f"{name}.left"], by_name[f"{name}.right"] = (
                factor.to(device) for factor in noise.factors(index, rows)
            )
        else:
            by_name[name] = noise.tensor(index, rows).to(device)
    return by_name


def _width(site: Site, noise: RowNoise) -> int:
    """Return the number of noise entries per row that the site's rule gets."""
    return sum(
        sum(noise.layouts[index]) if _factored(site, noise, index) else noise.shapes[index].numel()
        for index in site.tensors.values()
    )


def _split(values: Tensor, rows: int, pieces: list[slice]) -> list[Tensor]:
    """Split (R * m, ...) into the given pieces of R rows."""
    if values.dim() == 0 or len(values) % rows:
        raise RowMismatch(f"a tensor of shape {tuple(values.shape)} does not contain {rows} rows")
    return list(values.split([len(values) // rows * (cut.stop - cut.start) for cut in pieces]))


def _pieces(site: Site, noise: RowNoise, x: Tensor, activations: int) -> list[slice]:
    """Return the rows whose noise is unpacked at a time: on the CPU as much as stays in the cache,
    elsewhere also as much as takes the memory of the layer's activations.

    Args:
        site: the layer.
        noise: of the R rows.
        x: the layer's input.
        activations: numbers in the larger one of its input and its output.
    """
    room = 0 if x.device.type == "cpu" else activations * x.element_size() // 4  # of float32
    return list(blocks(len(noise), _width(site, noise), max(BLOCK, room)))


def _in_pieces(site: Site, noise: RowNoise, scale: float, x: Tensor, out: Tensor) -> Tensor:
    """Apply the site's rule to (R * m, ...), a few rows at a time."""
    pieces = _pieces(site, noise, x, max(x.numel(), out.numel()))
    outs = _split(out, len(noise), pieces)
    results = [
        site.rule(site.module, x_part, out_part, _noise_of(site, noise, piece, out.device), scale)
        for x_part, out_part, piece in zip(_split(x, len(noise), pieces), outs, pieces, strict=True)
    ]
    if len(results) == 1:
        return results[0]
    if all(a.data_ptr() == b.data_ptr() for a, b in zip(results, outs, strict=True)):
        return out  # changed in place
    return torch.cat(results)


def _watched(
    site: Site, noise: RowNoise, scale: float, fired: Callable[[], None]
) -> AbstractContextManager[object]:
    """Return a context with a forward hook that applies the site's rule."""

    def hook(module: nn.Module, args: tuple, kwargs: dict, out: object) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        if not torch.is_tensor(out) or not torch.is_tensor(x):
            raise RowMismatch(f"{type(module).__name__} does not map one tensor to one tensor")
        fired()
        return _in_pieces(site, noise, scale, x, out)

    # Before other hooks: one that casts a float32 output to 16 bits must not round the noise away.
    return site.module.register_forward_hook(hook, with_kwargs=True, prepend=True)


def _patched(
    site: Site, noise: RowNoise, scale: float, fired: Callable[[], None]
) -> AbstractContextManager[object]:
    """Return a context in which the site's rule replaces a method of the module."""
    original = getattr(site.module, str(site.method))
    # of a trained tensor: the module's others may be offloaded
    device = site.module.get_parameter(next(iter(site.tensors))).device

    def method(*args: object, **kwargs: object) -> object:
        fired()
        own_noise = _noise_of(site, noise, ALL, device)
        return site.rule(site.module, original, own_noise, scale, *args, **kwargs)

    return replaced_method(site.module, str(site.method), method)


def _fits(site: Site, noise: RowNoise) -> bool:
    """Return whether a site is a plain linear layer, for which `moved_linear` can be used."""
    return (
        site.rule is linear
        and type(site.module).forward is nn.Linear.forward
        and "forward" not in site.module.__dict__
        and "weight" in site.tensors
        and not noise.is_rank_one(site.tensors["weight"])
    )


def _replaced(
    site: Site, noise: RowNoise, scale: float, fired: Callable[[], None]
) -> AbstractContextManager[object]:
    """Return a context in which a linear layer uses perturbed weights for each row.

    One batched product replaces the layer's product and another one for the noise, at about the
    cost of the layer without noise.
    """
    module: Any = site.module
    original = module.forward

    # as in `nn.Linear`, the argument may be given by name
    def forward(input: Tensor) -> Tensor:
        fired()
        if input.dtype != module.weight.dtype or torch.is_autocast_enabled(input.device.type):
            return _in_pieces(site, noise, scale, input, original(input))
        widest = max(input.shape[-1], module.out_features)
        pieces = _pieces(site, noise, input, input.numel() // input.shape[-1] * widest)
        results = [
            moved_linear(module, x, _noise_of(site, noise, piece, input.device), scale)
            for x, piece in zip(_split(input, len(noise), pieces), pieces, strict=True)
        ]
        return results[0] if len(results) == 1 else torch.cat(results)

    return replaced_method(module, "forward", forward)


class RowwiseNoise(Perturbation):
    """Separate noise for each row of a forward pass: see `Perturbation`.

    Args:
        model: the model.
        vector: the perturbed parameters; each must have a per-row rule.
        distribution: a name in `DISTRIBUTIONS`.
        row_by_row: names of tensors whose layers run row by row.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from hf_flops.perturbations import NoiseKeys, ParameterVector, RowwiseNoise
        >>> model = nn.Linear(3, 2)
        >>> vector = ParameterVector.of(model)
        >>> perturbation = RowwiseNoise(model, vector, "rademacher")
        >>> keys = NoiseKeys.of(0, 0, torch.tensor([0, 1]), torch.tensor([0, 0]), 0)
        >>> noise = perturbation.draw(keys)  # of two rows
        >>> x = torch.ones(2, 3)
        >>> with perturbation.applied(noise, 0.5):
        ...     outputs = model(x)
        >>> torch.equal(outputs[0], outputs[1])  # the same input, but noise of its own for each row
        False
        >>> perturbation.weighted_noise(noise, torch.tensor([1.0, 1.0])).shape
        torch.Size([8])
    """

    def __init__(
        self,
        model: nn.Module,
        vector: ParameterVector,
        distribution: str,
        row_by_row: Collection[str] = (),
    ) -> None:
        self.vector, self.rowwise_size = vector, vector.size
        self.distribution = distribution
        self.row_bytes = bytes_per_row(distribution, vector.shapes)
        self.sites = find_sites(model, vector, row_by_row)
        covered = {index for site in self.sites for index in site.tensors.values()}
        if missing := [name for i, name in enumerate(vector.names) if i not in covered]:
            raise RowMismatch(f"no per-row rule covers {missing}")

    def draw(self, keys: NoiseKeys) -> RowNoise:
        """Draw from the rows' seeds."""
        return draw(self.distribution, keys.rows, self.vector.shapes, self.vector.device)

    @contextmanager
    def applied(
        self, noise: RowNoise, scale: float, fired: Counter[int] | None = None
    ) -> Iterator[None]:
        """See `Perturbation.applied`; `fired` counts calls of rules by index of the parameter."""
        ran: Counter[int] = Counter() if fired is None else fired
        with ExitStack() as stack:
            for site in self.sites:
                way = _patched if site.method else _replaced if _fits(site, noise) else _watched
                stack.enter_context(
                    way(site, noise, scale, partial(ran.update, site.tensors.values()))
                )
            yield

    def row_noise(self, noise: RowNoise) -> RowNoise:
        """See `Perturbation.row_noise`."""
        return noise

    def weighted_noise(self, noise: RowNoise, coefficients: Tensor) -> Tensor:
        """See `Perturbation.weighted_noise`."""
        return noise.exact_sum(onto(coefficients, self.vector.device, torch.float32))
