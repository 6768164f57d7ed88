"""Variance of one step's estimate, parameters fixed after some steps of backprop: ours, its parts,
MeZO.

On MiniLM the adapter is LoRA's B matrices in the last two layers and a new head, after 150 steps
with batches of 32; `--task prompts` takes the prompt of SmolLM2 from accuracy_tasks.py, after 90
steps with batches of 8. For batches that come after, the gradient by backprop and estimates from
real forwards at equal rows (16 per sample, the clean one included) are compared: `sum ||estimate -
gradient||^2 / sum ||gradient||^2`. What learns from past steps learns on other batches before.

    python benchmarks/variance.py
    python benchmarks/variance.py --task prompts --warm 30
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from accuracy_tasks import prompts  # isort: skip
from records import Record, quiet  # isort: skip
from tasks import reviews  # isort: skip

from hf_flops import BatchPosition, Method, SuffixPromptModel, estimate_gradient
from hf_flops.allocators import Optimal, Uniform
from hf_flops.estimators import Antithetic, LogitJacobian, OneSided, find_head
from hf_flops.objectives import TappedLoss
from hf_flops.perturbations import perturb
from hf_flops.reuse import ReusePlan, choose_reuse

QUERIES = 16
OPTIONS: dict[str, dict[str, bool]] = {
    "flops": {},
    "no control variate": {"control": False},
    "noise on the head": {"head": False},
    "equal counts": {"optimal": False},
    "rows alone (none of the three)": {"control": False, "head": False, "optimal": False},
}


def forward_of(model: nn.Module) -> Any:
    """Return what runs the model."""

    def forward(inputs: Any) -> tuple[Tensor, Any]:
        outputs = model(**inputs)
        return outputs.loss, outputs

    return forward


def ours(
    model: nn.Module,
    inputs: Any,
    *,
    control: bool = True,
    head: bool = True,
    optimal: bool = True,
    rows: int = 64,
) -> Method:
    """Build the default method, or one without some of its ingredients."""
    forward, objective = forward_of(model), TappedLoss(logits=True)
    found = find_head(model, objective, forward, inputs) if head else None
    known = set(found.vector.names) if found is not None else set()
    names = [name for name, p in model.named_parameters() if p.requires_grad and name not in known]
    perturbation = perturb(model, rowwise=names)
    reuse = reuse_of(model, objective, inputs, perturbation)
    allocator = Optimal() if optimal else Uniform()
    variate = LogitJacobian() if control else None
    return Method(
        objective,
        perturbation,
        OneSided(),
        allocator,
        QUERIES,
        1e-3,
        rows,
        reuse=reuse,
        head=found,
        control=variate,
    )


def reuse_of(model: nn.Module, objective: Any, inputs: Any, perturbation: Any) -> ReusePlan:
    """Return what runs once per sample; a prompt behind texts that have run shares all there is to
    share.
    """
    if isinstance(model, SuffixPromptModel):
        return ReusePlan()
    reuse, reason = choose_reuse(model, objective, forward_of(model), inputs, perturbation)
    assert reason is None, reason
    return reuse


def mezo(model: nn.Module, inputs: Any, rows: int = 64) -> Method:
    """Build the MeZO preset."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    perturbation = perturb(model, shared=names, distribution="gaussian")
    reuse = reuse_of(model, TappedLoss(), inputs, perturbation)
    return Method(
        TappedLoss(), perturbation, Antithetic(), Uniform(), QUERIES, 1e-3, rows, reuse=reuse
    )


def gradient(model: nn.Module) -> Tensor:
    """Take the gradient (d,) off the parameters."""
    return torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
    )


def measure(
    model: nn.Module, method: Method, warm: list[Any], batches: list[Any]
) -> dict[str, float]:
    """Return the relative variance, and the rows of a step."""
    error = size = rows = 0.0
    for step, (inputs, ids) in enumerate(warm + batches):
        model.zero_grad()
        result = estimate_gradient(
            forward_of(model), inputs, method, BatchPosition(step=step, ids=ids)
        )
        if step >= len(warm):
            found = gradient(model)
            model.zero_grad()
            model(**inputs).loss.backward()
            error += float((found - gradient(model)).square().sum())
            size += float(gradient(model).square().sum())
            rows += result.rows
    return {"variance": error / size, "rows": rows / len(batches)}


def minilm() -> tuple[nn.Module, Iterator[Any], float, int]:
    """Return the model, its batches, the learning rate of backprop, and how many steps it takes."""
    task = reviews(0, layers_to_transform=[4, 5])
    for name, parameter in task.model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
    return task.model, task.batches(0, 32), task.learning_rate, 150


def smollm2_prompt() -> tuple[nn.Module, Iterator[Any], float, int]:
    """Return what `minilm` does."""
    task = prompts()
    data, draw = task.splits["train"], torch.Generator().manual_seed(0)

    def batches() -> Iterator[Any]:
        while True:
            index = torch.randperm(len(data["labels"]), generator=draw)[: task.batch]
            yield {name: value[index] for name, value in data.items()}, tuple(index.tolist())

    return task.model(0).eval(), batches(), 0.03, 90


def main() -> None:
    """Measure, print, and write results/variance.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--task", choices=["minilm", "prompts"], default="minilm")
    parser.add_argument("--warm", type=int, default=60)
    parser.add_argument("--batches", type=int, default=12)
    options = parser.parse_args()
    quiet()
    model, stream, rate, steps = minilm() if options.task == "minilm" else smollm2_prompt()
    record = Record("variance" if options.task == "minilm" else f"variance_{options.task}")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        model.zero_grad()
        model(**next(stream)[0]).loss.backward()
        optimizer.step()
    warm, batches = ([next(stream) for _ in range(n)] for n in (options.warm, options.batches))
    with torch.no_grad():
        methods = {name: ours(model, warm[0][0], **without) for name, without in OPTIONS.items()}
        methods["mezo"] = mezo(model, warm[0][0])
    if methods["flops"].head is None:
        del methods["noise on the head"]
    dimension = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for name, method in reversed(methods.items()):
        learns = method.control is not None or isinstance(method.allocator, Optimal)
        found = measure(model, method, warm if learns else [], batches)
        record.keep(name, {**found, "dimension": dimension})
        ratio = found["variance"] / record.entries["mezo"]["variance"]
        print(
            f"{name:32} {found['variance']:8.1f}  {ratio:.3f} of MeZO's, {found['rows']:.0f} rows",
            flush=True,
        )


if __name__ == "__main__":
    main()
