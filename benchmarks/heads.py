"""Rows to a target accuracy where the head is solved: a run begins with clean rows only, whose
features determine the head.

    python benchmarks/heads.py --tasks digits fashion prompts8

Runs are those of accuracy_tasks.py with their documented rates, stopped soon after the first
queries. Every row that the model is asked for counts, those of the first batch's checks too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from records import ROOT, Record, quiet  # isort: skip

sys.path.insert(0, str(ROOT))

from accuracy import Run
from accuracy_tasks import LearningTask, digits, fashion, prompts

from hf_flops import FlopsTrainer, FlopsTrainingArguments

QUIET: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
QUERY_STEPS = 6  # after priming
TEXTS, FEW_TEXTS = 1504, 512
# of the forward-only runs in results/learning_<task>.json: rate and rows per sample
RATES = {"digits": (0.03, 4), "fashion": (0.01, 4), "prompts8": (0.005, 4)}
TASKS: dict[str, Callable[[], LearningTask]] = {
    "digits": digits,
    "fashion": fashion,
    "prompts8": lambda: prompts(
        8, " All in all, the movie was just", "prompts8", texts=TEXTS, label_head=True
    ),
}


class Watch(TrainerCallback):
    """Measures test accuracy after each optimizer step, and stops after the first query steps.

    While the adapter has not moved, the head's inputs on the test split are not computed again.
    """

    def __init__(self, task: LearningTask, run: Run, trainer: FlopsTrainer) -> None:
        self.task, self.run, self.trainer = task, run, trainer
        self.primed, self._start = 0, time.process_time()
        self._adapter: list[torch.Tensor] = []
        self._features = torch.empty(0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.curve.append((0, 0.0, self.task.accuracy(self.trainer.model, "test")))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        session = self.trainer.session
        self.primed += session.method.clean_only
        seconds = time.process_time() - self._start
        self.run.curve.append((self.trainer.ledger.all_rows, seconds, self._accuracy()))
        self._start = time.process_time() - seconds
        more = session.solver.primes(state.global_step, state.max_steps)
        queried = state.global_step - self.primed
        control.should_training_stop = not more and queried >= QUERY_STEPS

    @torch.no_grad()
    def _accuracy(self) -> float:
        head, model = self.trainer.session.chosen.head, self.trainer.model
        trained = [(n, p.detach().clone()) for n, p in model.named_parameters() if p.requires_grad]
        adapter = [parameter for name, parameter in trained if name not in head.names.values()]
        if not self._adapter or not all(map(torch.equal, adapter, self._adapter)):
            with head.watched() as inputs:
                self.task.accuracy(model, "test")
            self._adapter, self._features = adapter, torch.cat(inputs)
        labels = self.task.splits["test"]["labels"]
        return float((head.module(self._features).argmax(-1) == labels).double().mean())


def train(task: LearningTask, run: Run) -> int:
    """Fill a run's curve; return how many optimizer steps it primed."""
    args = FlopsTrainingArguments(
        "outputs/heads",
        preset="flops",
        per_device_train_batch_size=task.batch,
        max_steps=task.budget // (task.batch * run.queries),
        learning_rate=run.rate,
        lr_scheduler_type=task.schedule,
        warmup_steps=0.05,
        queries_per_sample=run.queries,
        perturbation_scale=task.scale,
        seed=run.seed,
        **QUIET,
    )
    trainer = FlopsTrainer(task.model(run.seed), args, train_dataset=task.train)
    watch = Watch(task, run, trainer)
    trainer.add_callback(watch)  # after the trainer's own, which solves the head
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return watch.primed


def target_of(name: str) -> float:
    """Return 90 % of the way from the untrained adapter to the best mean accuracy of backprop."""
    stored = json.loads((ROOT / "benchmarks" / "results" / f"learning_{name}.json").read_text())
    curves = stored["backprop"]["curves"].values()
    curve = np.mean([[point[2] for point in points] for points in curves], 0)
    return float(curve[0] + 0.9 * (curve.max() - curve[0]))


def measure(name: str, task: LearningTask, target: float, seeds: list[int]) -> dict[str, Any]:
    """Return rows to the target and the curves of some seeds."""
    (rate, queries), found = RATES[name], dict[str, Any]()
    for seed in seeds:
        run = Run(rate, queries, seed)
        primed = train(task, run)
        reached = run.to(target)
        points = [(rows, round(accuracy, 4)) for rows, _, accuracy in run.curve]
        ends = {"rows to target": reached and reached[0], "after clean rows": points[primed]}
        found[str(seed)] = {**ends, "curve": points}
        print(f"{name}, target {target:.1%}, seed {seed}: {found[str(seed)]}", flush=True)
    return {"target": target, "rate": rate, "queries": queries, "seeds": found}


def main() -> None:
    """Measure and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    given = parser.parse_args()
    quiet()
    record = Record("heads")
    for name in given.tasks:
        task, target = TASKS[name](), 0.8 if name == "prompts8" else target_of(name)
        if name == "prompts8":
            whole = replace(task, budget=10 * task.budget, batch=32)
            record.keep(f"{name}, {TEXTS} texts", measure(name, whole, 0.84, given.seeds[:1]))
            few = {key: value[:FEW_TEXTS] for key, value in task.splits["train"].items()}
            task = replace(task, splits={**task.splits, "train": few})
        record.keep(name, measure(name, task, target, given.seeds))


if __name__ == "__main__":
    main()
