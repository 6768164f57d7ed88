"""Where a model's trainable parameters act, and which per-row rule knows how."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ..base.patching import Call
from .base import ParameterVector
from .peft_rules import is_adapter_layer, prompt, wrapper_rule
from .row_loop import looped
from .rules import rule_for


@dataclass(frozen=True)
class Site:
    """A module whose output depends on trainable parameters in a way that a rule knows.

    Attributes:
        module: the module that is watched; for soft prompts, the model that hands them out.
        tensors: name of each parameter within the module → its index in the parameter vector.
        rule: what the module's output becomes, or where `method` is given what that method returns.
        method: the method that the rule takes the place of; None for rules that change the module's
            output.
    """

    module: nn.Module
    tensors: dict[str, int]
    rule: Call
    method: str | None = None


def prompt_owner(model: nn.Module) -> nn.Module | None:
    """Return the module that hands out soft prompts through `get_prompt`, as PEFT's prompt learning
    does.
    """
    for module in model.modules():
        if (
            hasattr(module, "prompt_encoder")
            and getattr(module, "active_peft_config", None) is not None
        ):
            return module
    return None


def _whole_sites(model: nn.Module, index: dict[int, int], names: Collection[int]) -> Iterator[Site]:
    """Yield the sites whose rule takes a method's place: prompts, PEFT's layers, and those that are
    run row by row.
    """
    owner = prompt_owner(model)
    inside: set[int] = set()  # modules below a layer that is run row by row
    for module in model.modules():
        if id(module) in inside:
            continue
        found: tuple[Call, str] | None
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
            inside.update(
                map(id, layer.prompt_encoder.modules() if module is owner else module.modules())
            )
            yield Site(module, tensors, looped, "get_prompt" if module is owner else "forward")
        elif plain and found is not None:
            # A base layer's own tensors have rules of their own.
            tensors = {name: i for name, i in tensors.items() if not name.startswith("base_layer.")}
            if tensors:
                yield Site(module, tensors, *found)


def find_sites(
    model: nn.Module, vector: ParameterVector, row_by_row: Collection[str] = ()
) -> list[Site]:
    """List the sites at which rules exist; a parameter is covered only if every module that holds
    it has one.

    Args:
        model: the model.
        vector: the parameters to cover.
        row_by_row: names of those whose layers are run row by row.
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
        if rule is None or not set(tensors) <= {"weight", "bias"}:
            uncovered.update(tensors.values())
        else:
            sites.append(Site(module, tensors, rule))
    return [site for site in sites if uncovered.isdisjoint(site.tensors.values())]
