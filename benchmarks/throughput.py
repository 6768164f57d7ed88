"""Rows per second of our step, of the MeZO preset and of backprop, against plain inference of the
same rows.

Sides take turns in one process, in another order each time, and are compared within a turn; the
medians over turns are reported, because machines are shared and noisy. glibc keeps freed memory,
for all sides alike: whether it gave blocks of 10 MB back to the system, which makes a thousand
pages anew for each, was chance, and worth 20 % either way.

`overhead` is the part of our step that is spent outside the model's forward (noise inside the
layers belongs to the forward), `control variate` what a step is longer by than one without it; both
are shares of our step.

    python benchmarks/throughput.py                        # all cases
    python benchmarks/throughput.py minilm minilm-third    # some
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cases import CASES, SIDES, Case  # isort: skip
from records import Record, quiet  # isort: skip
from hf_flops.base.transfer import synchronise  # isort: skip

# read when a process starts
HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


def measure(
    case: Case, repeats: int, methods: dict[str, Callable[[], None]] | None = None
) -> dict[str, Any]:
    """Time every side in turn, or the given ones; returns medians in seconds and the ratios of rows
    per second to plain inference.
    """
    methods = case.methods() if methods is None else methods
    device = next(iter(case.inputs.values())).device
    seconds: dict[str, list[float]] = {side: [] for side in methods}
    overhead = []
    order, shuffled = list(methods), random.Random(0)
    for turn in range(repeats + 1):
        shuffled.shuffle(order)
        for side in order:
            case.model.zero_grad()
            case.seconds = 0.0
            synchronise(device)
            start = time.perf_counter()
            methods[side]()
            synchronise(device)
            spent = time.perf_counter() - start
            if turn:  # the first turn warms up
                seconds[side].append(spent)
                if side == "ours":
                    overhead.append(1 - case.seconds / spent)
    ran = {methods[side].rows for side in ("ours", "mezo") if side in methods}  # type: ignore[attr-defined]
    assert ran == {case.rows}
    medians = {side: float(np.median(own)) for side, own in seconds.items()}
    ratios = {side: np.divide(seconds["plain"], own) for side, own in seconds.items()}
    return {
        "case": case.name,
        "rows": case.rows,
        "rows_per_forward": case.chunk,
        "parameters": sum(p.numel() for p in case.model.parameters() if p.requires_grad),
        "seconds": medians,
        "rows_per_second": {side: case.rows / own for side, own in medians.items()},
        "against_plain": {side: float(np.median(own)) for side, own in ratios.items()},
        "quartiles": {
            side: np.quantile(own, [0.25, 0.75]).tolist() for side, own in ratios.items()
        },
        "overhead": float(np.median(overhead)),
        "control_variate": 1 - float(np.median(np.divide(seconds["no control"], seconds["ours"])))
        if "no control" in seconds
        else 0.0,
    }


def main() -> None:
    """Measure cases one after the other; write results/throughput.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cases", nargs="*", default=[])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"unknown cases {sorted(unknown)}: choose among {', '.join(CASES)}")
    if not HEAP.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **HEAP})
    quiet()
    record = Record("throughput")
    print(
        "| case | rows/s, plain | ours / plain | MeZO / plain | backprop / plain | overhead | "
        "control variate |"
    )
    print("| --- |" + " --- |" * 6)
    for name in options.cases or CASES:
        found = measure(CASES[name](), options.repeats)
        record.keep(name, found)
        ratios = " | ".join(f"{found['against_plain'][side]:.2f}" for side in SIDES[1:])
        shares = f"{found['overhead']:.1%} | {found['control_variate']:.1%}"
        print(
            f"| {found['case']} | {found['rows_per_second']['plain']:.0f} | {ratios} | {shares} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
