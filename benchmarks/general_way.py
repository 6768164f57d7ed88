"""Cost of the general way to a loss per row: rows per second of a loss that is computed again for
each row, over those of the tap on the same loss and the same rows.

Both take turns; seconds are those of the processor, as machines are shared.

    OMP_NUM_THREADS=1 python benchmarks/general_way.py minilm smollm2
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import numpy as np
import torch

from cases import CASES  # isort: skip
from records import Record, quiet  # isort: skip
from hf_flops.base.batch import take
from hf_flops.objectives import Objective, RowwiseLoss, TappedLoss


def measure(name: str, repeats: int, number: int | None) -> dict[str, object]:
    """Time a chunk of rows with both objectives."""
    case = CASES[name]()
    number = number or case.chunk
    rows = take(case.inputs, torch.arange(number) % len(case.inputs["labels"]))
    pair = take(case.inputs, torch.tensor([0, 1]))
    sides: dict[str, Objective] = {
        "tap": TappedLoss(),
        "each row": RowwiseLoss(case.forward, case.forward, pair),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(repeats + 1):
        for side in list(sides)[:: 1 if turn % 2 else -1]:
            run = partial(sides[side], case.forward, rows)
            start = time.process_time()
            run()
            if turn:  # the first turn warms up
                seconds[side].append(time.process_time() - start)
    return {
        "case": case.name,
        "rows": number,
        "rows_per_second": {s: number / float(np.median(own)) for s, own in seconds.items()},
        "against_tap": float(np.median(np.divide(seconds["tap"], seconds["each row"]))),
    }


@torch.no_grad()
def main() -> None:
    """Measure cases one after the other; write results/general_way.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cases", nargs="*", default=["minilm", "smollm2"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", type=int, help="in one forward")
    options = parser.parse_args()
    quiet()
    record = Record("general_way")
    print("| case | rows | rows/s, tap | each row / tap |\n| --- | --- | --- | --- |")
    for name in options.cases:
        found = measure(name, options.repeats, options.rows)
        record.keep(name, found)
        tap = found["rows_per_second"]["tap"]  # type: ignore[index]
        print(f"| {found['case']} | {found['rows']} | {tap:.0f} | {found['against_tap']:.3f} |")


if __name__ == "__main__":
    main()
