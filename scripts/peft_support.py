"""Tries every PEFT method of the installed release on tiny models and writes docs/peft-support.md.

For each it runs the self-check of the first step as a trainer would, one training step, and then
compares what queries saw with autograd and with explicit changes of the parameters. `--only NAME`
prints the rows of a few methods instead.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import peft
import torch
from torch import Tensor, nn

from hf_flops import BatchPosition, Method, estimate_gradient
from hf_flops.allocators import Uniform
from hf_flops.autotune.row_loss_check import choose_objective
from hf_flops.autotune.rule_check import choose_perturbation
from hf_flops.estimators import Antithetic
from hf_flops.objectives import Objective
from hf_flops.perturbations import NoiseKeys, ParameterVector, Perturbation, RowwiseNoise, displaced
from scripts.peft_methods import KINDS, TEXT_ONLY, configure, methods
from tests.helpers.tiny import model_forward, tiny_batch, tiny_model

PAGE = ROOT / "docs" / "peft-support.md"
TOLERANCE = 0.02  # relative; differences in float32 are no better
LEFT_OUT = (
    "noise follows the loss as it is; PEFT's backward pass gives something else (DoRA takes a norm "
    "for a constant, OSF projects, C3A is a few per cent off)"
)


@dataclass
class Finding:
    """What came of one method on one model.

    Attributes:
        ways: how noise enters → the kinds of tensors; empty where the method cannot be used.
        reason: why it cannot, or why the loss belongs to the batch as a whole.
        autograd: largest relative error of a query's difference against autograd; None where
            autograd has no answer.
    """

    ways: dict[str, list[str]] = field(default_factory=dict)
    reason: str = ""
    autograd: float | None = None


def off_the_start(model: nn.Module) -> None:
    """Move trainable tensors off their first values, at which some hide others (`lora_B = 0`)."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(
                parameter.dtype
            )


def ways_of(perturbation: Perturbation, model: nn.Module) -> dict[str, list[str]]:
    """Return for each way of noise the kinds of tensors that it moves."""
    ways: dict[str, list[str]] = {}
    moved = set()
    for part in perturbation.parts:
        sites = part.sites if isinstance(part, RowwiseNoise) else []
        row_by_row = {
            i
            for site in sites
            if getattr(site.rule, "__name__", "") == "looped"
            for i in site.tensors.values()
        }
        for index, name in enumerate(part.vector.names):
            way = (
                "shared"
                if part.shares_noise
                else "row by row"
                if index in row_by_row
                else "per row"
            )
            ways.setdefault(way, []).append(name)
            moved.add(name)
    idle = [name for name in ParameterVector.of(model).names if name not in moved]
    return {**ways, "without effect": idle} if idle else ways


def kinds_of(names: list[str]) -> list[str]:
    """Reduce tensors' names to what tells their kinds apart."""
    short = {
        re.sub(r"(\.default|\.weight|\.bias|\.original\w*|\.\d+)+$", "", name).split(".")[-1]
        for name in names
    }
    return sorted(short)


def compare(
    model: nn.Module, objective: Objective, perturbation: Perturbation, inputs: Any
) -> tuple[float, float | None]:
    """Compare the differences that four queries see with explicit changes of parameters and with
    autograd.

    Returns:
        The largest relative errors against both; the second is None where autograd has no answer.
    """
    wide = {
        name: value.double() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    model.double()
    with contextlib.suppress(RuntimeError):
        errors = _compare(model_forward(model), objective, perturbation, wide, 1e-5)
        if max(errors[0], errors[1] or 0.0) < TOLERANCE:
            return errors
    model.float()  # something in the model computes in float32 whatever its parameters are
    # Kinks and curvature want small steps there, rounding wants large ones.
    tried = [
        _compare(model_forward(model), objective, perturbation, inputs, scale)
        for scale in (2e-3, 3e-4, 1e-4)
    ]
    return min(tried, key=lambda errors: max(errors[0], errors[1] or 0.0))


def _compare(
    forward: Any, objective: Objective, perturbation: Perturbation, inputs: Any, scale: float
) -> tuple[float, float | None]:
    vector, place = perturbation.vector, torch.arange(4)
    noise = perturbation.draw(NoiseKeys.of(0, 0, place, torch.zeros_like(place), 0))
    with torch.no_grad():
        seen = []
        for sign in (1, -1):
            with perturbation.applied(noise, sign * scale):
                seen.append(objective(forward, inputs).sums)
        deltas = ((seen[0] - seen[1]) / (2 * scale)).double()
        directions = [
            perturbation.weighted_noise(noise, row).double() for row in torch.eye(4)[: len(deltas)]
        ]
        slopes = [
            _slope(vector, objective, forward, inputs, z, scale)[r]
            for r, z in enumerate(directions)
        ]
    explicit = torch.stack(slopes).double()
    size = float(explicit.abs().max())
    error = float((deltas - explicit).abs().max()) / size
    try:
        losses, found = objective(forward, inputs).sums, []
        for row, z in enumerate(directions):
            gradients = torch.autograd.grad(
                losses[row], vector.parameters, retain_graph=True, allow_unused=True
            )
            pairs = zip(gradients, vector.views(z), strict=True)
            found.append(sum(float((g.double() * v).sum()) for g, v in pairs if g is not None))
    except RuntimeError:
        return error, None
    return error, float((deltas - torch.tensor(found, dtype=torch.float64)).abs().max()) / size


def _slope(
    vector: ParameterVector,
    objective: Objective,
    forward: Any,
    inputs: Any,
    z: Tensor,
    scale: float,
) -> Tensor:
    """Return the central difference (R,) of the losses under an explicit change of the parameters
    along z (d,).
    """
    ends = []
    for sign in (1, -1):
        with displaced(vector, sign * scale * z):
            ends.append(objective(forward, inputs).sums)
    return (ends[0] - ends[1]) / (2 * scale)


def one_step(
    forward: Any, inputs: Any, objective: Objective, perturbation: Perturbation, model: nn.Module
) -> None:
    """Run a training step in float32 and see that only gradients are left of it."""
    before = copy.deepcopy(dict(model.named_parameters()))
    method = Method(objective, perturbation, Antithetic(), Uniform(), 4, 1e-3, 8)
    estimate_gradient(forward, inputs, method, BatchPosition())
    assert all(value.equal(before[name]) for name, value in model.named_parameters()), (
        "parameters have changed"
    )
    assert all(
        p.grad is not None and bool(p.grad.isfinite().all()) for p in perturbation.vector.parameters
    )
    model.zero_grad()


def examine(kind: str, name: str, options: dict[str, Any]) -> Finding:
    """Try a method on a model.

    Raises:
        AssertionError: a query does not see what its change of the parameters does.
    """
    if name == "XLORA":
        return Finding(reason="not tried: it mixes adapters that were trained before")
    if kind == "vit" and (name in TEXT_ONLY or "trainable_token_indices" in options):
        return Finding(reason="needs a model of text")
    inputs = tiny_batch(kind)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = peft.get_peft_model(tiny_model(kind), configure(kind, name, options)).eval()
        if name in ("POLY", "MULTITASK_PROMPT_TUNING"):
            inputs["task_ids"] = torch.zeros(4, dtype=torch.int64)
        forward = model_forward(model)
        forward(inputs)
    except Exception as error:  # PEFT refuses in many ways, and what it says is the finding
        return Finding(reason=f"PEFT: {str(error).strip().splitlines()[0]}")
    off_the_start(model)
    with torch.no_grad():
        objective, reason = choose_objective(forward, inputs)
        perturbation, _ = choose_perturbation(model, objective, forward, inputs)
        one_step(forward, inputs, objective, perturbation, model)
    explicit, autograd = compare(model, objective, perturbation, inputs)
    assert explicit < TOLERANCE, (
        f"{name} on {kind}: queries are {explicit:.1%} off what a change of the parameters does"
    )
    return Finding(ways_of(perturbation, model), re.sub(r" \d+\.\d+", "", reason or ""), autograd)


def cell(finding: Finding, notes: list[str]) -> str:
    """Write a table cell; reasons go to the notes."""

    def note(text: str) -> str:
        if text not in notes:
            notes.append(text)
        return f" [{notes.index(text) + 1}]"

    if not finding.ways:
        return "–" + note(finding.reason)
    several = len(finding.ways) > 1
    parts = [
        f"{way}: {', '.join(kinds_of(names))}" if several else way
        for way, names in finding.ways.items()
    ]
    text = "; ".join(parts) + (note(finding.reason) if finding.reason else "")
    if finding.autograd is None:
        return text + note(
            "autograd finds no derivative; compared with changes of the parameters only"
        )
    if finding.autograd > TOLERANCE:
        text += note(LEFT_OUT)
    return text


def lines(only: list[str], kinds: list[str]) -> Iterator[str]:
    """Yield the lines of the table and its notes."""
    notes: list[str] = []
    yield "| method | " + " | ".join(KINDS[kind] for kind in kinds) + " |"
    yield "| --- |" + " --- |" * len(kinds)
    for row, name, options in methods():
        if not only or row in only:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cells = [cell(examine(kind, name, options), notes) for kind in kinds]
            yield f"| {row} | " + " | ".join(cells) + " |"
    yield ""
    yield from (f"{i}. {note}" for i, note in enumerate(notes, 1))


INTRODUCTION = f"""# PEFT methods

What `perturbation="auto"` does with every method of PEFT {peft.__version__}, as
`python scripts/peft_support.py` found it on tiny models with random weights. For every entry the
script ran the self-check and a training step as a trainer does, and then compared what four queries
saw with explicit changes of the parameters; where no note says otherwise, also with autograd.

- **per row**: every row of a forward pass has noise of its own, all rows at once; on the weights,
  or on the outputs of linear layers where that needs fewer random numbers.
- **row by row**: the same estimate, but the adapted layers (only these) run once for each row,
  which costs time.
- **shared**: the rows of a forward share their noise, query by query; allocation of queries gains
  little.

`modules_to_save` are heads that PEFT adds to a classifier by itself.

"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="*", default=[], help="rows to print, in place of writing the page"
    )
    only = parser.parse_args().only
    text = "\n".join(lines(only, list(KINDS))) + "\n"
    if only:
        print(text)
    else:
        PAGE.write_text(INTRODUCTION + text)
