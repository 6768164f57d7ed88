"""What suits noisy estimates: optimizers, adapters, batches.

Each tuned on a grid of rates, at the same rows.

The rate by the mean validation accuracy along the run with seed 0, then three
other seeds on the test split, whose last two evaluations are averaged. Adapters are trained by
backprop too, with an eighth of the rows.

    python benchmarks/studies.py optimizers
    python benchmarks/studies.py adapters
    python benchmarks/studies.py batches
    python benchmarks/studies.py --table
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    TinyLoraConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from transformers import TrainerCallback, set_seed

from records import ROOT, Record, quiet  # isort: skip

sys.path.insert(0, str(ROOT))

from accuracy import GRID, LossSpread, Run, train  # isort: skip
from accuracy_tasks import TASKS, LearningTask

from recipes.images import load_images, load_vit, pretrained_vit

SEEDS, POINTS = [1, 2, 3], 8
STEEP = [1e-2, 3e-2, 1e-1, 3e-1, 1.0]  # rates of what does not divide by the gradient's size


class Signs(TrainerCallback):
    """Leaves the signs of the gradient."""

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.sign_()


@dataclass
class Variant:
    """Something to try.

    Attributes:
        rates: its grid.
        queries: rows of a sample.
        batch: samples of a step; 0 for the task's.
        options: changes of the trainer's arguments.
        callbacks: what makes callbacks.
        adapter: puts an adapter on a model; None for the task's.
        order: what puts the training samples in order; None for a random one in every epoch.
    """

    rates: list[float] = field(default_factory=lambda: GRID)
    queries: int | str = 4
    batch: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    callbacks: list[Callable[[], TrainerCallback]] = field(default_factory=list)
    adapter: Callable[[nn.Module], nn.Module] | None = None
    order: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None


def put(
    config: Callable[..., PeftConfig], *, only: str = "", **options: Any
) -> Callable[[nn.Module], nn.Module]:
    """Return what puts an adapter and a new head on a model; tensors of it train that have `only`
    in their names.
    """

    def on(model: nn.Module) -> nn.Module:
        adapted = get_peft_model(model, config(modules_to_save=["classifier"], **options))
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_(
                parameter.requires_grad and ("classifier" in name or only in name)
            )
        return adapted

    return on


def head(model: nn.Module) -> nn.Module:
    """Train the head alone."""
    model.requires_grad_(False).classifier.requires_grad_(True)  # type: ignore[union-attr]
    return model


def balanced(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return samples in an order in which every stretch has all classes equally often, shuffled
    epoch after epoch.
    """
    labels = torch.tensor([int(sample["labels"]) for sample in samples])
    generator, order = torch.Generator().manual_seed(0), []
    for _ in range(40):
        kinds = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
        shuffled = [own[torch.randperm(len(own), generator=generator)].tolist() for own in kinds]
        order += [own[i] for i in range(min(map(len, shuffled))) for own in shuffled]
    return [samples[i] for i in order]


LAYERS = {"target_modules": ["q_proj", "v_proj"]}
STUDIES: dict[str, dict[str, Variant]] = {
    "optimizers": {
        "AdamW (0.9, 0.999)": Variant(),
        "AdamW (0.9, 0.99)": Variant(options={"adam_beta2": 0.99}),
        "AdamW (0.95, 0.9999)": Variant(options={"adam_beta1": 0.95, "adam_beta2": 0.9999}),
        "RMSprop": Variant(options={"optim": "rmsprop"}),
        "SGD": Variant(STEEP, options={"optim": "sgd", "max_grad_norm": 0.0}),
        "SGD over the loss spread": Variant(
            STEEP, options={"optim": "sgd", "max_grad_norm": 0.0}, callbacks=[LossSpread]
        ),
        "signs": Variant(options={"optim": "sgd", "max_grad_norm": 0.0}, callbacks=[Signs]),
        "AdamW, no clipping": Variant(options={"max_grad_norm": 0.0}),
    },
    "adapters": {
        "LoRA 2, B alone": Variant(
            adapter=put(LoraConfig, only="lora_B", r=2, lora_alpha=4, **LAYERS)
        ),
        "LoRA 1, B alone": Variant(
            adapter=put(LoraConfig, only="lora_B", r=1, lora_alpha=2, **LAYERS)
        ),
        "LoRA 8, B alone": Variant(
            adapter=put(LoraConfig, only="lora_B", r=8, lora_alpha=16, **LAYERS)
        ),
        "LoRA 2": Variant(adapter=put(LoraConfig, r=2, lora_alpha=4, **LAYERS)),
        "VeRA 16": Variant(adapter=put(VeraConfig, r=16, **LAYERS)),
        "TinyLoRA": Variant(adapter=put(TinyLoraConfig, **LAYERS)),
        "IA3": Variant(adapter=put(IA3Config, feedforward_modules=[], **LAYERS)),
        "LayerNorm": Variant(
            adapter=put(LNTuningConfig, target_modules=["layernorm_before", "layernorm_after"])
        ),
        "the head alone": Variant(adapter=head),
    },
    "batches": {
        **{
            f"{b} samples, {q} rows": Variant(GRID[1:4], q, b)
            for b, q in [(8, 16), (16, 8), (32, 4), (64, 2), (32, 16)]
        },
        "8 samples, 4 rows": Variant(GRID[1:4], 4, 8),
        "32 samples, auto": Variant(GRID[1:4], "auto", 32),
        "32 samples of all classes, 4 rows": Variant(
            GRID[1:4], options={"train_sampling_strategy": "sequential"}, order=balanced
        ),
    },
}


class Ordered(LearningTask):
    """A task whose training samples come in a given order."""

    order: Any = None

    @property
    def train(self) -> list[dict[str, Any]]:
        """See `LearningTask`."""
        return self.order(super().train)


def changed(task: LearningTask, images: str, variant: Variant) -> LearningTask:
    """Return a task with what a variant changes."""
    if variant.adapter is not None:
        own = load_images(images, seed=0)
        path, put_on = pretrained_vit(own), variant.adapter

        def model(seed: int) -> nn.Module:
            set_seed(seed)
            return put_on(load_vit(path, own)[0])

        task = replace(task, model=model)
    if variant.order is not None:
        ordered = Ordered(**vars(task))
        object.__setattr__(ordered, "order", variant.order)
        task = ordered
    return replace(task, batch=variant.batch) if variant.batch else task


def measure(
    name: str, variant: Variant, task: LearningTask, rows: int, method: str
) -> dict[str, Any]:
    """Tune a variant's rate, and run it with the other seeds."""
    queries = 4 if variant.queries == "auto" else int(variant.queries)
    options = {
        **variant.options,
        **({"queries_per_sample": "auto"} if variant.queries == "auto" else {}),
    }
    budget = rows // 8 if method == "backprop" else rows

    def run(rate: float, seed: int, part: str) -> Run:
        changes = {**options, "callbacks": [make() for make in variant.callbacks]}
        if variant.queries == "auto":
            changes["max_queries"] = budget
        return train(
            method,
            task,
            Run(rate, queries, seed),
            budget,
            part,
            POINTS,
            f"{name}, {method}",
            **changes,
        )

    grid = {rate: run(rate, 0, "validation").mean for rate in variant.rates}
    best = max(grid, key=lambda rate: grid[rate])
    runs = [run(best, seed, "test") for seed in SEEDS]
    size = sum(p.numel() for p in task.model(0).parameters() if p.requires_grad)
    ends, means = [own.end for own in runs], [own.mean for own in runs]
    return {
        "rate": best,
        "grid": grid,
        "accuracy": ends,
        "means": means,
        "rows": runs[0].curve[-1][0],
        "size": size,
    }


def table(entries: dict[str, Any]) -> str:
    """Lay all studies out as a Markdown table."""
    lines = [
        "| study | variant | method | numbers | rate | accuracy at the end | mean along the run | "
        "rows |",
        "| --- " * 8 + "|",
    ]
    for study, variants in entries.items():
        for name, methods in variants.items():
            # not what the record adds
            for method, found in methods.items() if isinstance(methods, dict) else []:
                ends = found["accuracy"]
                lines.append(
                    f"| {study} | {name} | {method} | {found['size']:,} | {found['rate']:g} | "
                    f"{np.mean(ends):.1%} ± {np.std(ends, ddof=1):.1%} | "
                    f"{np.mean(found['means']):.1%} | {found['rows']:,} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Run studies, and write results/studies_<task>.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("studies", nargs="*", choices=[*STUDIES, []], help="all by default")
    parser.add_argument("--task", choices=["digits", "fashion"], default="digits")
    parser.add_argument("--rows", type=int, default=26_000)
    parser.add_argument(
        "--table", action="store_true", help="run nothing, print what the record holds"
    )
    options = parser.parse_args()
    quiet()
    record = Record(f"studies_{options.task}")
    images = "fashion_mnist" if options.task == "fashion" else options.task
    task = None if options.table else TASKS[options.task]()
    for study in [] if task is None else options.studies or STUDIES:
        for name, variant in STUDIES[study].items():
            methods = ["flops", "backprop"] if study == "adapters" else ["flops"]
            own = changed(task, images, variant)
            found = {
                method: measure(name, variant, own, options.rows, method) for method in methods
            }
            record.keep(study, {**record.entries.get(study, {}), name: found})
    print(table(record.entries))


if __name__ == "__main__":
    main()
