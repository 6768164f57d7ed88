"""Finds the modules that use a model's trainable parameters, and their per-row rules."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ..base.patching import Call
from .base import ParameterVector
from .peft_rules import is_adapter_layer, prompt, wrapper_rule
from .row_loop import looped, recurrent
from .rules import broadcast, rule_for


@dataclass(frozen=True)
class Site:
    """A module with trainable parameters that a rule covers.

    Attributes:
        module: the module; for soft prompts, the model that returns them.
        tensors: name of each parameter within the module → its index in the parameter vector.
        rule: computes the module's perturbed output, or the result of `method` if it is given.
        method: the method that the rule replaces; None for rules that change the module's output.
    """

    module: nn.Module
    tensors: dict[str, int]
    rule: Call
    method: str | None = None


def prompt_owner(model: nn.Module) -> nn.Module | None:
    """Return the module whose `get_prompt` returns soft prompts, as in PEFT's prompt learning."""
    owners = (
        module
        for module in model.modules()
        if hasattr(module, "prompt_encoder") and getattr(module, "active_peft_config", None)
    )
    return next(owners, None)


def _whole_sites(model: nn.Module, index: dict[int, int], names: Collection[int]) -> Iterator[Site]:
    """Yield the sites whose rule replaces a method: prompts, PEFT's layers, layers run by row."""
    owner = prompt_owner(model)
    inside: set[int] = set()  # modules inside a layer that runs row by row
    for module in model.modules():
        loops = isinstance(module, nn.RNNBase)
        if id(module) in inside or not (module is owner or loops or is_adapter_layer(module)):
            continue
        whole, prefix, method = module, "", "forward"
        rule = None if loops else wrapper_rule(module)
        if module is owner:
            whole, prefix, method = (
                cast(Any, module).prompt_encoder,
                "prompt_encoder.",
                "get_prompt",
            )
            plain = cast(Any, module).active_peft_config.peft_type == "PROMPT_TUNING"
            rule = (prompt, method) if plain else None
        tensors = {
            name: index[id(parameter)]
            for name, parameter in module.named_parameters()
            if id(parameter) in index and name.startswith(prefix)
        }
        if any(i in names for i in tensors.values()):
            inside.update(map(id, whole.modules()))
            yield Site(module, tensors, recurrent if loops else looped, method)
        elif rule is not None:
            # The tensors of the base layer have their own rules.
            tensors = {name: i for name, i in tensors.items() if not name.startswith("base_layer.")}
            if tensors:
                yield Site(module, tensors, *rule)


def find_sites(
    model: nn.Module, vector: ParameterVector, row_by_row: Collection[str] = ()
) -> list[Site]:
    """Return the sites of the parameters for which every module that has them has a rule.

    Args:
        model: the model.
        vector: the perturbed parameters.
        row_by_row: names of parameters whose layers run row by row.
    """
    index = {id(parameter): i for i, parameter in enumerate(vector.parameters)}
    sites = list(
        _whole_sites(model, index, {i for i, name in enumerate(vector.names) if name in row_by_row})
    )
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
        if rule is not None and set(tensors) <= {"weight", "bias"}:
            sites.append(Site(module, tensors, rule))
        elif rule is None and not isinstance(module, nn.RNNBase):
            sites.append(Site(module, tensors, broadcast, "forward"))
        else:
            uncovered.update(tensors.values())
    return [site for site in sites if uncovered.isdisjoint(site.tensors.values())]
