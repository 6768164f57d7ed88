"""The ledger of a run: rows that went through the model, and the queries of each sample."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..base.batch import Inputs, batch_size
from ..base.state import State, number, whole
from ..core.method import FinishedBatch, StepResult
from ..distributed.collectives import ProcessGroup
from ..objectives import Forward


def columns(inputs: Inputs) -> int:
    """Return how many tokens each row of a batch has, padding included; 0 where it is not text."""
    texts = (inputs.get(name) for name in ("input_ids", "inputs_embeds"))
    return next((text.shape[1] for text in texts if torch.is_tensor(text) and text.dim() > 1), 0)


def class_labels(inputs: Inputs) -> list[int] | None:
    """Return the class of each sample; None if labels are not one whole number per sample."""
    labels = inputs.get("labels")
    if not torch.is_tensor(labels) or labels.dim() != 1 or labels.is_floating_point():
        return None
    return labels.tolist()


MOST_SAMPLES = 2**17  # whose queries are counted one by one


class Ledger:
    """Counts rows and queries, and averages the metrics of steps between two logs.

    Attributes:
        rows: rows that went through the model for estimates so far, clean ones and the calibration
            of epsilon included.
        all_rows: rows that the model was asked for in training, those of the checks with the first
            batch included, once for a run however often it is resumed.
        repeated_rows: rows of checks that resumed runs made again, on top of `all_rows`.
        tokens: tokens of all these rows, padding included, as if every row ran whole.
        sample_queries: sample id → [steps that the sample took part in, queries that it got], for
            samples that have an id; at most 2^17, those without a step for longest are dropped.
        class_windows: [rows so far, {class: [samples, their queries]}] for each stretch of the run,
            at most 64.
        last_step: what the last batch found.
    """

    def __init__(self) -> None:
        self.rows = self.all_rows = self.tokens = self.repeated_rows = 0
        self.sample_queries: OrderedDict[int, list[int]] = OrderedDict()
        self.class_windows: list[tuple[int, dict[int, list[int]]]] = []
        self.last_step: StepResult | None = None
        self._window: dict[str, list[float]] = {}
        self._classes: dict[int, list[int]] = {}
        self._checked = ""  # the tensors of the last checks
        self._resumed: str | None = (
            None  # the same of the checkpoint, until the first batch is done
        )
        self._began = time.monotonic()  # earlier by what a run took before it was resumed

    @property
    def seconds(self) -> float:
        """Seconds since the run began, evaluations included."""
        return round(time.monotonic() - self._began, 3)

    def metered(self, forward: Forward) -> Forward:
        """Return a function that runs the model and counts what it was asked for."""

        def run(inputs: Inputs) -> tuple[Tensor | None, object]:
            outputs = forward(inputs)
            self.all_rows += batch_size(inputs)
            self.tokens += batch_size(inputs) * columns(inputs)
            return outputs

        return run

    def observe(self, finished: FinishedBatch) -> None:
        """Enter a finished batch of a trainer."""
        self.record(finished.result, finished.position.ids, class_labels(finished.inputs))

    def charge_checks(self, before: tuple[int, int], tensors: Callable[[], str]) -> None:
        """Enter the rows of checks since `before`, unless a resumed run makes them once more.

        Args:
            before: `all_rows` and `tokens` of then.
            tensors: returns what tells for which tensors the checks were.
        """
        if self.all_rows == before[0]:
            return
        self._checked = tensors()
        if self._checked == self._resumed:
            self.repeated_rows += self.all_rows - before[0]
            self.all_rows, self.tokens = before

    def reconcile(self, before: tuple[int, int], ran: int, group: ProcessGroup) -> None:
        """Enter the rows that all processes ran since `before`; rows that all ran count once.

        Args:
            before: `all_rows` and `tokens` of then.
            ran: rows of all processes.
            group: the processes.
        """
        if group.world > 1:
            rows, tokens = before
            self.all_rows = rows + ran
            self.tokens = tokens + int(
                group.all_reduce(torch.tensor([self.tokens - tokens], dtype=torch.int32))
            )

    def record(
        self,
        result: StepResult,
        ids: Sequence[int] | None = None,
        labels: Sequence[int] | None = None,
    ) -> None:
        """Enter a finished batch; ids, labels: (B,) of its samples, if they have any."""
        self.last_step, self._resumed = result, None
        self.rows += result.rows
        for totals, numbers in ((self.sample_queries, ids), (self._classes, labels)):
            if numbers is not None and len(numbers) == len(result.counts):
                for number, count in zip(numbers, result.counts.tolist(), strict=True):
                    _add(totals, number, [1, count])
        for sample in ids or ():
            if sample in self.sample_queries:
                self.sample_queries.move_to_end(sample)
        while len(self.sample_queries) > MOST_SAMPLES:
            self.sample_queries.popitem(last=False)
        for name, value in result.metrics.items():
            self._window.setdefault(name, []).append(value)

    def _close_window(self) -> None:
        """End a stretch of the run; where there are many, neighbours become one."""
        if self._classes:
            self.class_windows.append((self.rows, self._classes))
            self._classes = {}
        if len(self.class_windows) > 64:
            for (_, before), (_, classes) in zip(
                self.class_windows[::2], self.class_windows[1::2], strict=False
            ):
                for label, numbers in before.items():
                    _add(classes, label, numbers)
            self.class_windows = (
                self.class_windows[1::2] + self.class_windows[len(self.class_windows) // 2 * 2 :]
            )

    def summary(self) -> dict[str, float]:
        """Return averages since the last call; ratios are of averages: single steps are noisy."""
        if not self._window:
            return {}
        mean = {name: sum(values) / len(values) for name, values in self._window.items()}
        signal, variance = mean.pop("gradient_signal", None), mean.pop("gradient_variance", 0.0)
        sample_signal, _ = mean.pop("sample_signal", 0.0), mean.pop("head_signal", None)
        summary = {**mean, "dropped_rows": sum(self._window["dropped_rows"])}
        if signal is not None:  # else processes sum gradients less often than there are batches
            summary["signal_to_noise"] = max(signal, 0.0) / variance if variance > 0 else 0.0
        if signal is not None and signal > 0:
            # mean(||g_i||)^2 / B over ||g||^2: below 1, noise per row with the best counts beats
            # shared noise.
            summary["noise_ratio"] = sample_signal / signal
        self._close_window()
        self._window = {}
        return {
            **{name: round(value, 6) for name, value in summary.items()},
            "rows": self.rows,
            "check_rows": self.all_rows - self.rows,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }

    def state_dict(self) -> State:
        """Return what a resume needs, as JSON-serialisable values."""
        return {
            "rows": self.rows,
            "all_rows": self.all_rows,
            "tokens": self.tokens,
            "repeated_rows": self.repeated_rows,
            "checked": self._checked,
            "seconds": self.seconds,
            "samples": [[sample, *numbers] for sample, numbers in self.sample_queries.items()],
            "classes": [
                [rows, [[label, *numbers] for label, numbers in classes.items()]]
                for rows, classes in self.class_windows
            ],
        }

    def load_state_dict(self, state: State) -> None:
        """Take up a state from `state_dict`."""
        self.rows, self.all_rows = whole(state["rows"]), whole(state["all_rows"])
        self.tokens, self.repeated_rows = whole(state["tokens"]), whole(state["repeated_rows"])
        self._checked = self._resumed = str(state["checked"])
        self._began = time.monotonic() - number(state["seconds"], 0)
        self.sample_queries = OrderedDict(
            (whole(sample, -(2**63)), [whole(steps, 1), whole(queries)])
            for sample, steps, queries in state["samples"]
        )
        self.class_windows = [
            (
                whole(rows),
                {label: [whole(samples), whole(queries)] for label, samples, queries in classes},
            )
            for rows, classes in state["classes"]
        ]


def _add(totals: dict[int, list[int]], number: int, more: Sequence[int]) -> None:
    """Add [samples, queries] to those of a sample or class."""
    if number not in totals and len(totals) > MOST_SAMPLES:
        return
    samples, queries = totals.get(number, (0, 0))
    totals[number] = [samples + more[0], queries + more[1]]
