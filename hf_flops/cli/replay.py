"""`hf-flops replay`: an adapter from the log of its run, and whether a checkpoint is what the log
leads to.
"""

from __future__ import annotations

import argparse
import time


def parser() -> argparse.ArgumentParser:
    """Return what reads the arguments."""
    own = argparse.ArgumentParser(
        prog="hf-flops replay",
        description="Rebuild an adapter bit for bit from the log that training with "
        "trajectory_log=True wrote: without data and without forward passes. Every step is "
        "compared with the fingerprints that training left in the log.",
    )
    own.add_argument("log", help="trajectory.log, or the output folder that it lies in")
    own.add_argument("--output", metavar="DIR", help="where the adapter is saved")
    own.add_argument(
        "--step",
        type=int,
        help="the adapter after this optimizer step; default: the last one, or VERIFY's",
    )
    own.add_argument(
        "--base",
        metavar="MODEL",
        help="folder or Hub id: check that this is the base that was trained on",
    )
    own.add_argument(
        "--verify",
        metavar="CHECKPOINT",
        help="say at which step and tensors this folder departs from the log",
    )
    return own


def main(arguments: list[str] | None = None) -> int:
    """Replay, and say what came of it; the exit code is 1 where a checkpoint departs from its
    log.
    """
    own = parser()
    given = own.parse_args(arguments)
    if given.output is None and given.verify is None:
        own.error("nothing to do: give --output DIR, --verify CHECKPOINT, or both")
    from ..trajectory.replay import replay
    from ..trajectory.verify import verify

    start, right = time.perf_counter(), True
    if given.base is not None:
        from ..trajectory.base import check_base
        from ..trajectory.replay import Replay

        print(
            f"{given.base} is the base of the run: "
            f"{check_base(Replay(given.log).says, given.base)} tensors are the same."
        )
    if given.verify is not None:
        verdict = verify(given.log, given.verify, given.step)
        print(verdict)
        right = verdict.right
    if given.output is not None:
        rebuilt = replay(given.log, given.output, given.step)
        print(
            f"{given.output}: the adapter after step {rebuilt.step}, in "
            f"{time.perf_counter() - start:.1f} s."
        )
    return 0 if right else 1
