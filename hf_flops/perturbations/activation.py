"""Noise on the outputs of linear layers: gradients as products with the known inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..base.prng import seeds
from ..base.transfer import onto
from .base import ParameterVector, Perturbation
from .noise import draw
from .rules import RowMismatch, conv1d_gpt2, linear
from .sites import Site, find_sites
from .streams import NoiseKeys

_STREAM = 2**61  # keeps this noise apart from the weights' noise of the same rows
_RIDGE = 1e-4


@dataclass(frozen=True)
class _Call:
    """What `weighted_noise` needs of one call of a site.

    Attributes:
        bias: (R, out) sources, summed over tokens.
        weight: the rows' products (R, in, out) of inputs and sources, or inputs (R, T, in) and
            sources (R, T, out) where these are smaller.
    """

    bias: Tensor
    weight: Tensor | tuple[Tensor, Tensor]

    def sums(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Return (in, out) and (out,), weight and bias summed over rows with coefficients (R,)."""
        # a dropped row may hold NaN, and 0 times NaN is NaN
        kept = coefficients != 0
        bias = coefficients @ torch.where(kept[:, None], self.bias, 0.0)
        if isinstance(self.weight, tuple):
            x, sources = (torch.where(kept[:, None, None], part, 0.0) for part in self.weight)
            return torch.einsum("rti,rto->io", x, sources * coefficients[:, None, None]), bias
        weight = torch.where(kept[:, None, None], self.weight, 0.0)
        return torch.einsum("r,rio->io", coefficients, weight), bias


@dataclass
class Drawn:
    """The noise of a chunk, drawn in the first forward, when the number of tokens is known.

    Attributes:
        keys: the rows' seeds.
        noise: (site, call) → (R, T, out).
        calls: (site, call) → inputs and sources of the last forward.
    """

    keys: NoiseKeys
    noise: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    calls: dict[tuple[int, int], _Call] = field(default_factory=dict)


def correlated(gram: Tensor) -> Tensor:
    """Return L (R, T, T), `L L^T = G + ridge`: the covariance that noise on weights would cause.

    Args:
        gram: G (R, T, T), inner products of a row's inputs.
    """
    if gram.shape[1] == 1:
        return independent(gram)
    size = gram.diagonal(dim1=1, dim2=2)
    ridge = _RIDGE * size.mean(1, keepdim=True) + torch.finfo(gram.dtype).tiny ** 0.5
    factor, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(ridge.expand_as(size)))
    return torch.where((failed == 0)[:, None, None], factor, independent(gram))  # any L is unbiased


def independent(gram: Tensor) -> Tensor:
    """Return the diagonal L (R, T, T) of the inputs' lengths: independent noise, as published."""
    tiny = torch.finfo(gram.dtype).tiny ** 0.5
    return torch.diag_embed((gram.diagonal(dim1=1, dim2=2) + tiny).sqrt())


class ActivationNoise(Perturbation):
    """Noise on the outputs of linear layers: see `Perturbation`.

    A row's tokens x_t (T, in) give outputs `y = x W^T + b`; noise `u = L xi` is added to y, with xi
    (T, out) of mean 0 and identity covariance. To first order `delta = sum <g, L xi>` with g =
    ds/dy, so

        E[delta (L^-T xi)] = L^-T L^T g = g
        grad W = g^T x = E[delta (L^-T xi)^T x],    grad b = sum_t g_t

    for every invertible L. Diagonal L is the published method. By default `L L^T` is the matrix of
    inner products `x_t . x_t'` (plus 1 where there is a bias), plus a ridge that keeps it
    invertible: then u has the distribution that weight noise of unit variance would cause, deltas
    have the same meaning as elsewhere, and `delta (L^-T xi)^T x` is the expectation of the
    weight-noise estimate given the forward's values (Rao-Blackwell). It uses T x out random
    numbers, not in x out: for one token (a head on a pooled output) the outer product of xi and `x
    / ||x||`.

    The inputs are those of the last perturbed forward. Compared with clean inputs this changes the
    estimate by O(eps^2), the order of the difference's own bias, because noise is symmetric.

    Args:
        model: the model.
        vector: the parameters to move; all must belong to `nn.Linear` or GPT-2's `Conv1D`.
        distribution: "gaussian" or "rademacher".
        mixing: maps a row's inner products (R, T, T) to L.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from hf_flops.perturbations import ActivationNoise, NoiseKeys, ParameterVector
        >>> model = nn.Linear(3, 2)
        >>> vector = ParameterVector.of(model)
        >>> perturbation = ActivationNoise(model, vector, "rademacher")
        >>> keys = NoiseKeys.of(0, 0, torch.tensor([0, 1]), torch.tensor([0, 0]), 0)
        >>> noise = perturbation.draw(keys)  # of two rows
        >>> with perturbation.applied(noise, 0.5):
        ...     outputs = model(torch.rand(2, 3))
        >>> perturbation.dimension(noise), vector.size  # fewer random numbers than parameters
        (2, 8)

    References:
        Ren et al. (2025), FLOPS, arXiv 2410.05966, section 3; Peng et al. (2022), a new likelihood
        ratio method.
    """

    replays = True

    def __init__(
        self,
        model: nn.Module,
        vector: ParameterVector,
        distribution: str,
        mixing: Callable[[Tensor], Tensor] = correlated,
    ) -> None:
        self.vector, self.distribution, self.mixing = vector, distribution, mixing
        self.sites = find_sites(model, vector)
        missing = [
            name
            for index, name in enumerate(vector.names)
            if {is_linear(s) for s in self.sites if index in s.tensors.values()} != {True}
        ]
        if missing:
            raise RowMismatch(f"{missing} do not belong to linear layers")

    def draw(self, keys: NoiseKeys) -> Drawn:
        """Store the rows' seeds; see `Drawn`."""
        return Drawn(keys)

    @contextmanager
    def applied(self, noise: Drawn, scale: float) -> Iterator[None]:
        """See `Perturbation.applied`."""
        noise.calls.clear()
        with ExitStack() as stack:
            for index, site in enumerate(self.sites):
                hook = partial(self._hook, noise, scale, index)
                stack.enter_context(site.module.register_forward_hook(hook, with_kwargs=True))
            yield

    def _hook(
        self,
        noise: Drawn,
        scale: float,
        index: int,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        out: object,
    ) -> Tensor:
        """Add noise to an output, and keep what `weighted_noise` needs."""
        rows, tensors = len(noise.keys.rows), self.sites[index].tensors
        x = args[0] if args else next(iter(kwargs.values()))
        if not torch.is_tensor(out) or not torch.is_tensor(x) or len(x) % rows or len(out) % rows:
            raise RowMismatch(f"{type(module).__name__} does not get {rows} rows")
        x = x.reshape(rows, -1, x.shape[-1])
        x = x if x.dtype == torch.float64 else x.float()
        size = x.shape[1], out.shape[-1]
        call = (index, sum(site == index for site, _ in noise.calls))
        if call not in noise.noise:
            keys = seeds(_STREAM, noise.keys.rows, *call)
            noise.noise[call] = (
                draw(self.distribution, keys, [torch.Size(size)], x.device).tensor(0).to(x)
            )
        xi = noise.noise[call]
        with torch.autocast(x.device.type, enabled=False):
            mix = self.mixing(_gram(x, tensors))
            sources = torch.linalg.solve_triangular(mix.transpose(1, 2), xi, upper=True)
            fewer = size[0] < size[1] or "weight" not in tensors
            noise.calls[call] = _Call(
                sources.sum(1), (x, sources) if fewer else x.transpose(1, 2) @ sources
            )
            return torch.add(out, (mix @ xi).reshape(out.shape).to(out.dtype), alpha=scale)

    def dimension(self, noise: Drawn) -> int:
        """See `Perturbation.dimension`."""
        return sum(values[0].numel() for values in noise.noise.values())

    def weighted_noise(self, noise: Drawn, coefficients: Tensor) -> Tensor:
        """See `Perturbation.weighted_noise`; needs a forward under this noise before it."""
        flat = torch.zeros(self.vector.size, device=self.vector.device)
        views = self.vector.views(flat)
        for (index, _), call in noise.calls.items():
            site = self.sites[index]
            weight, bias = call.sums(onto(coefficients, call.bias.device, call.bias.dtype))
            if "weight" in site.tensors:
                views[site.tensors["weight"]].add_(
                    (weight.T if site.rule is linear else weight).to(flat)
                )
            if "bias" in site.tensors:
                views[site.tensors["bias"]].add_(bias.to(flat))
        return flat


def is_linear(site: Site) -> bool:
    """Return whether a site's gradient is a product of its input and its output's gradient."""
    return site.rule in (linear, conv1d_gpt2)


def _gram(x: Tensor, tensors: dict[str, int]) -> Tensor:
    """Return the inner products (R, T, T) of inputs x (R, T, in), plus 1 for a trainable bias."""
    gram = (
        x @ x.transpose(1, 2)
        if "weight" in tensors
        else x.new_zeros(len(x), x.shape[1], x.shape[1])
    )
    return gram + 1 if "bias" in tensors else gram
