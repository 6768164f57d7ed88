"""Peak memory of our step, of the MeZO preset and of backprop, against plain inference of the same
chunk.

Every side runs in a process of its own; what it needed above the loaded model is its peak. Blocks
of 128 KB and more go back to the system when they are freed, for all sides alike: what glibc's heap
keeps of them otherwise is chance (75 to 146 MB for the same plain inference).

    python benchmarks/memory.py
    python benchmarks/memory.py minilm smollm2
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import numpy as np

from cases import CASES, SIDES  # isort: skip
from records import Record, quiet  # isort: skip

from hf_flops.base.memory import PeakMemory


def one(name: str, side: str) -> float:
    """Return megabytes above the model's own that a step needs, after one that loads what is loaded
    once in a process.
    """
    case = CASES[name]()
    method = case.methods()[side]
    method()
    case.model.zero_grad()
    with PeakMemory() as memory:
        method()
    return memory.megabytes


def main() -> None:
    """Measure cases in processes of their own; write results/memory.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cases", nargs="*", default=[])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--one",
        nargs=2,
        metavar=("CASE", "SIDE"),
        help="measure in this process and print megabytes",
    )
    options = parser.parse_args()
    quiet()
    if options.one:
        print(one(*options.one))
        return
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"unknown cases {sorted(unknown)}: choose among {', '.join(CASES)}")
    record, environment = Record("memory"), {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    print(
        "| case | plain, MB | ours / plain | MeZO / plain | backprop / plain | ours / backprop |\n"
        "| --- |" + " --- |" * 5
    )
    for name in options.cases or CASES:
        found: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(options.repeats):
            for side in SIDES:
                command = [sys.executable, __file__, "--one", name, side]
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, check=True
                )
                found[side].append(float(done.stdout.split()[-1]))
        peak = {side: float(np.median(own)) for side, own in found.items()}
        record.keep(name, {"megabytes": peak})
        ratios = [peak[side] / peak["plain"] for side in SIDES[1:]] + [
            peak["ours"] / peak["backprop"]
        ]
        print(
            f"| {name} | {peak['plain']:.0f} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
