"""One noise per row of a forward pass, by forward hooks, so that all queries of a step fit in one batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .base import ParameterVector
from .noise import NoiseKeys, RowNoise, blocks, draw
from .rules import FACTORED, Noise, RowMismatch, Rule, rule_for


@dataclass(frozen=True)
class Site:
    """A module whose output depends on trainable parameters in a way that a rule knows.

    Attributes:
        module: the module that is watched; for soft prompts, the model that hands them out.
        tensors: attribute name of each parameter → its index in the parameter vector.
        rule: None for soft prompts, which do not pass through a module's output.
    """

    module: nn.Module
    tensors: dict[str, int]
    rule: Rule | None


def prompt_owner(model: nn.Module) -> nn.Module | None:
    """Return the module that hands out soft prompts through `get_prompt`, as PEFT's prompt tuning does."""
    for module in model.modules():
        config = getattr(module, "active_peft_config", None) if hasattr(module, "prompt_encoder") else None
        if config is not None and str(getattr(config.peft_type, "value", config.peft_type)) == "PROMPT_TUNING":
            return module
    return None


def find_sites(model: nn.Module, vector: ParameterVector) -> list[Site]:
    """List the sites at which rules exist; a parameter is covered only if every module that holds it has one."""
    index = {id(parameter): i for i, parameter in enumerate(vector.parameters)}
    owner = prompt_owner(model)
    prompts = set(owner.prompt_encoder.modules()) if owner is not None else set()  # type: ignore[union-attr]
    sites: list[Site] = []
    uncovered: set[int] = set()
    for module in model.modules():
        tensors = {
            name: index[id(parameter)]
            for name, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in index
        }
        if not tensors:
            continue
        rule = rule_for(module)
        if module in prompts and owner is not None:
            sites.append(Site(owner, tensors, None))
        elif rule is None or not set(tensors) <= {"weight", "bias"}:
            uncovered.update(tensors.values())
        else:
            sites.append(Site(module, tensors, rule))
    return [site for site in sites if uncovered.isdisjoint(site.tensors.values())]


def _factored(site: Site, noise: RowNoise, index: int) -> bool:
    """Return whether the site's rule gets the factors of a parameter's noise."""
    return noise.is_rank_one(index) and site.rule in FACTORED


def _own(site: Site, noise: RowNoise, rows: slice, device: torch.device) -> Noise:
    """Return the noise of a site's parameters for some rows, as its rule wants it."""
    own: Noise = {}
    for name, index in site.tensors.items():
        if _factored(site, noise, index):
            own[f"{name}.left"], own[f"{name}.right"] = (factor.to(device) for factor in noise.factors(index, rows))
        else:
            own[name] = noise.tensor(index, rows).to(device)
    return own


def _width(site: Site, noise: RowNoise) -> int:
    """Return how many numbers of noise the site's rule gets for each row."""
    return sum(
        sum(noise.layouts[index]) if _factored(site, noise, index) else noise.shapes[index].numel()
        for index in site.tensors.values()
    )


def _split(values: Tensor, rows: int, pieces: list[slice]) -> list[Tensor]:
    """Cut (R * m, ...) as R rows are cut."""
    if values.dim() == 0 or len(values) % rows:
        raise RowMismatch(f"a tensor of shape {tuple(values.shape)} does not hold {rows} rows")
    each = len(values) // rows
    return list(values.split([each * (piece.stop - piece.start) for piece in pieces]))


def _watch(site: Site, noise: RowNoise, scale: float, fired: Callable[[], None]) -> Callable[[], None]:
    """Install a forward hook that applies the site's rule, and return what removes it.

    The rule gets a few rows at a time, so that unpacked noise stays in the cache.
    """
    rows, rule = len(noise), site.rule
    pieces = list(blocks(rows, _width(site, noise)))

    def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        if not torch.is_tensor(out) or not torch.is_tensor(x):
            raise RowMismatch(f"{type(module).__name__} does not map one tensor to one tensor")
        fired()
        assert rule is not None
        outs = _split(out, rows, pieces)
        results = [
            rule(module, own_x, own_out, _own(site, noise, piece, out.device), scale)
            for own_x, own_out, piece in zip(_split(x, rows, pieces), outs, pieces, strict=True)
        ]
        if len(results) == 1:
            return results[0]
        in_place = all(result.data_ptr() == own.data_ptr() for result, own in zip(results, outs, strict=True))
        return out if in_place else torch.cat(results)

    return site.module.register_forward_hook(hook, with_kwargs=True).remove


def _patch_prompt(site: Site, noise: RowNoise, scale: float, fired: Callable[[], None]) -> Callable[[], None]:
    """Let `get_prompt` add each row's noise to its prompt (R, P, D), and return what undoes it."""
    owner: Any = site.module
    original, patched_before = owner.get_prompt, owner.__dict__.get("get_prompt")
    shift = noise.tensor(site.tensors["weight"]) * scale

    def get_prompt(batch_size: int, *args: Any, **kwargs: Any) -> Tensor:
        prompts = original(batch_size, *args, **kwargs)
        if batch_size % len(shift) or prompts.shape[1:] != shift.shape[1:]:
            raise RowMismatch(f"prompts of shape {tuple(prompts.shape)} for noise of shape {tuple(shift.shape)}")
        fired()
        return prompts + shift.to(prompts).repeat_interleave(batch_size // len(shift), 0)

    def restore() -> None:
        del owner.get_prompt
        if patched_before is not None:
            owner.get_prompt = patched_before

    owner.get_prompt = get_prompt
    return restore


class RowwiseNoise:
    """Every row of a forward pass has noise of its own: see `Perturbation`.

    Args:
        model: the model whose modules are watched.
        vector: the parameters to move; every one must be covered by a site.
        distribution: a name in `DISTRIBUTIONS`.
    """

    grouped = False

    def __init__(self, model: nn.Module, vector: ParameterVector, distribution: str) -> None:
        self.vector = vector
        self.distribution = distribution
        self.sites = find_sites(model, vector)
        covered = {index for site in self.sites for index in site.tensors.values()}
        missing = [name for index, name in enumerate(vector.names) if index not in covered]
        if missing:
            raise RowMismatch(f"no per-row rule covers {missing}")

    @staticmethod
    def covered(model: nn.Module, vector: ParameterVector) -> set[str]:
        """Return the names of the parameters that per-row rules exist for."""
        return {vector.names[i] for site in find_sites(model, vector) for i in site.tensors.values()}

    def draw(self, keys: NoiseKeys) -> RowNoise:
        """Draw from the rows' seeds."""
        return draw(self.distribution, keys.rows, self.vector.shapes, self.vector.device)

    @contextmanager
    def applied(self, noise: RowNoise, scale: float, fired: Counter[int] | None = None) -> Iterator[None]:
        """See `Perturbation.applied`; counts in `fired`, by index of the parameter, how often its rule ran."""
        ran: Counter[int] = Counter() if fired is None else fired
        removers: list[Callable[[], None]] = []
        try:
            for site in self.sites:
                install = _watch if site.rule else _patch_prompt
                removers.append(install(site, noise, scale, partial(ran.update, site.tensors.values())))
            yield
        finally:
            for remove in reversed(removers):
                remove()

    def pull_back(self, noise: RowNoise, coefficients: Tensor) -> Tensor:
        """See `Perturbation.pull_back`."""
        return noise.weighted_sum(coefficients.to(self.vector.device, torch.float32))
