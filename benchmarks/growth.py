"""A run over a million samples: what a step, a save, the memory and the files come to at its
beginning and at its end.

Every sample has an id of its own and is seen once, which is the worst case for whatever remembers
samples.

    python benchmarks/growth.py --steps 20000 --batch 50
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback

from hf_flops import FlopsTrainer, FlopsTrainingArguments

from records import Record  # isort: skip


class Points(Dataset):
    """Points of the plane and the half that they are in, made when they are asked for."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = [(index * 0.6180339887) % 2 - 1, (index * 0.7548776662) % 2 - 1]
        return {"x": x, "labels": int(x[0] + x[1] > 0), "sample_id": index}


class Small(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the loss and the logits."""
        logits = self.head(self.body(x).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Meter(TrainerCallback):
    """Measures steps, saves, memory and files, a window of steps at a time."""

    def __init__(self, window: int) -> None:
        self.window, self.windows = window, list[dict[str, float]]()
        self._times: list[float] = []
        self._last = self._saving = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it; the stock trainer saves next if the window is over."""
        self._times.append(time.perf_counter() - self._last)
        self._saving = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Enter a window."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        self.windows.append(
            {
                "steps": state.global_step,
                "samples": state.global_step * args.per_device_train_batch_size,
                "step_ms": 1e3 * statistics.median(self._times),
                "save_s": time.perf_counter() - self._saving,
                "memory_mb": psutil.Process().memory_info().rss / 2**20,
                "checkpoint_mb": sum(f.stat().st_size for f in folder.rglob("*")) / 2**20,
            }
        )
        print({name: round(value, 2) for name, value in self.windows[-1].items()}, flush=True)
        self._times = []


def main() -> None:
    """Run, and write results/growth.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--head", default="solve", help="closed_form_head")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    scratch = tempfile.mkdtemp(prefix="hf_flops_growth_")
    meter = Meter(chosen.steps // chosen.windows)
    args = FlopsTrainingArguments(
        scratch,
        max_steps=chosen.steps,
        per_device_train_batch_size=chosen.batch,
        queries_per_sample=2,
        closed_form_head=chosen.head,
        learning_rate=1e-3,
        save_steps=meter.window,
        save_total_limit=1,
        logging_steps=meter.window,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        pictures=False,
    )
    data = Points(chosen.steps * chosen.batch)
    trainer = FlopsTrainer(Small(), args, train_dataset=data, callbacks=[meter])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    Record("growth").keep(chosen.head, {"batch": chosen.batch, "windows": meter.windows})
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
