"""One noise per row of a forward pass, by forward hooks, so that all queries of a step fit in one batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .base import ParameterVector
from .loop import looped
from .noise import NoiseKeys, draw
from .rules import Noise, RowMismatch, rule_for
from .wrappers import is_adapter_layer, prompt, wrapper_rule


@dataclass(frozen=True)
class Site:
    """A module whose output depends on trainable parameters in a way that a rule knows.

    Attributes:
        module: the module that is watched; for soft prompts, the model that hands them out.
        tensors: name of each parameter within the module → its index in the parameter vector.
        rule: what the module's output becomes, or where `method` is given what that method returns.
        method: the method that the rule takes the place of; None for rules that change the module's output.
    """

    module: nn.Module
    tensors: dict[str, int]
    rule: Callable[..., Any]
    method: str | None = None


def prompt_owner(model: nn.Module) -> nn.Module | None:
    """Return the module that hands out soft prompts through `get_prompt`, as PEFT's prompt learning does."""
    for module in model.modules():
        if hasattr(module, "prompt_encoder") and getattr(module, "active_peft_config", None) is not None:
            return module
    return None


def _whole_sites(model: nn.Module, index: dict[int, int], names: Collection[int]) -> Iterator[Site]:
    """Yield the sites whose rule takes a method's place: prompts, PEFT's layers, and those that are run row by row."""
    owner = prompt_owner(model)
    inside: set[int] = set()  # modules below a layer that is run row by row
    for module in model.modules():
        if id(module) in inside:
            continue
        found: tuple[Callable[..., Any], str] | None
        prefix, layer = "", cast(Any, module)
        if module is owner:
            kind = layer.active_peft_config.peft_type
            found, prefix = (prompt, "get_prompt"), "prompt_encoder."
            plain = str(getattr(kind, "value", kind)) == "PROMPT_TUNING"
        else:
            found = wrapper_rule(module)
            plain = found is not None
        if not plain and module is not owner and not is_adapter_layer(module):
            continue
        tensors = {
            name: index[id(parameter)]
            for name, parameter in module.named_parameters()
            if id(parameter) in index and name.startswith(prefix)
        }
        if any(i in names for i in tensors.values()):
            inside.update(map(id, layer.prompt_encoder.modules() if module is owner else module.modules()))
            yield Site(module, tensors, looped, "get_prompt" if module is owner else "forward")
        elif plain and found is not None:
            # A base layer's own tensors have rules of their own.
            tensors = {name: i for name, i in tensors.items() if not name.startswith("base_layer.")}
            if tensors:
                yield Site(module, tensors, *found)


def find_sites(model: nn.Module, vector: ParameterVector, looping: Collection[str] = ()) -> list[Site]:
    """List the sites at which rules exist; a parameter is covered only if every module that holds it has one.

    Args:
        model: the model.
        vector: the parameters to cover.
        looping: names of those whose layers are run row by row.
    """
    index = {id(parameter): i for i, parameter in enumerate(vector.parameters)}
    sites = list(_whole_sites(model, index, {i for i, name in enumerate(vector.names) if name in looping}))
    taken = {
        (id(site.module.get_submodule(name.rpartition(".")[0])), name.rpartition(".")[2])
        for site in sites
        for name in site.tensors
    }
    uncovered: set[int] = set()
    for module in model.modules():
        tensors = {
            name: index[id(parameter)]
            for name, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in index and (id(module), name) not in taken
        }
        if not tensors:
            continue
        rule = rule_for(module)
        if rule is None or not set(tensors) <= {"weight", "bias"}:
            uncovered.update(tensors.values())
        else:
            sites.append(Site(module, tensors, rule))
    return [site for site in sites if uncovered.isdisjoint(site.tensors.values())]


def _watch(site: Site, noise: Noise, scale: float, fired: Callable[[], None]) -> Callable[[], None]:
    """Install a forward hook that applies the site's rule, and return what removes it."""

    def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        if not torch.is_tensor(out) or not torch.is_tensor(x):
            raise RowMismatch(f"{type(module).__name__} does not map one tensor to one tensor")
        fired()
        return site.rule(module, x, out, noise, scale)

    return site.module.register_forward_hook(hook, with_kwargs=True).remove


def _patch(site: Site, noise: Noise, scale: float, fired: Callable[[], None]) -> Callable[[], None]:
    """Let the site's rule take the place of a method of the module, and return what undoes it."""
    owner, name = site.module, str(site.method)
    original, patched_before = getattr(owner, name), owner.__dict__.get(name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        fired()
        return site.rule(owner, original, noise, scale, *args, **kwargs)

    def restore() -> None:
        delattr(owner, name)
        if patched_before is not None:
            setattr(owner, name, patched_before)

    setattr(owner, name, patched)
    return restore


class RowwiseNoise:
    """Every row of a forward pass has noise of its own: see `Perturbation`.

    Args:
        model: the model whose modules are watched.
        vector: the parameters to move; every one must be covered by a site.
        distribution: "gaussian" or "rademacher".
        looping: names of tensors whose layers are run row by row.
    """

    grouped = False
    replays = False

    def __init__(self, model: nn.Module, vector: ParameterVector, distribution: str, looping: Collection[str] = ()) -> None:
        self.vector = vector
        self.distribution = distribution
        self.sites = find_sites(model, vector, looping)
        covered = {index for site in self.sites for index in site.tensors.values()}
        missing = [name for index, name in enumerate(vector.names) if index not in covered]
        if missing:
            raise RowMismatch(f"no per-row rule covers {missing}")

    @staticmethod
    def covered(model: nn.Module, vector: ParameterVector, looping: Collection[str] = ()) -> set[str]:
        """Return the names of the parameters that per-row rules exist for."""
        return {vector.names[i] for site in find_sites(model, vector, looping) for i in site.tensors.values()}

    def draw(self, keys: NoiseKeys) -> Tensor:
        """Draw (R, d) from the rows' seeds."""
        return draw(self.distribution, keys.rows, self.vector.size).to(self.vector.device)

    @contextmanager
    def applied(self, noise: Tensor, scale: float, fired: Counter[int] | None = None) -> Iterator[None]:
        """See `Perturbation.applied`; counts in `fired`, by index of the parameter, how often its rule ran."""
        views = self.vector.views(noise)
        ran: Counter[int] = Counter() if fired is None else fired
        removers: list[Callable[[], None]] = []
        try:
            for site in self.sites:
                own = {name: views[i].to(self.vector.parameters[i].device) for name, i in site.tensors.items()}
                install = _patch if site.method else _watch
                removers.append(install(site, own, scale, partial(ran.update, site.tensors.values())))
            yield
        finally:
            for remove in reversed(removers):
                remove()

    def dimension(self, noise: Tensor) -> int:
        """See `Perturbation.dimension`."""
        return self.vector.size

    def pull_back(self, noise: Tensor, coefficients: Tensor) -> Tensor:
        """See `Perturbation.pull_back`."""
        return coefficients.to(noise.device, noise.dtype) @ noise
