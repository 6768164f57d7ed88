"""`hf-flops replay`: rebuild an adapter from the log of its run, or verify a checkpoint."""

from __future__ import annotations

import time

from .parsers import CommandParser


def parser() -> CommandParser:
    """Return what reads the arguments."""
    command = CommandParser(
        prog="hf-flops replay",
        description="Rebuild an adapter bit for bit from the log that training with "
        "trajectory_log=True wrote: without data and without forward passes. Every step is "
        "compared with the fingerprints that training left in the log.",
    )
    command.add_argument("log", help="trajectory.log, or the output folder that contains it")
    command.add_argument("--output", metavar="DIR", help="where the adapter is saved")
    command.add_argument(
        "--step",
        type=int,
        help="the adapter after this optimizer step; default: the last one, or VERIFY's",
    )
    command.add_argument(
        "--base",
        metavar="MODEL",
        help="folder or Hub id: check that this is the base that was trained on",
    )
    command.add_argument(
        "--verify",
        metavar="CHECKPOINT",
        help="say at which step and tensors this folder departs from the log",
    )
    return command


def main(arguments: list[str] | None = None) -> int:
    """Replay and print the result; the exit code is 1 if a checkpoint differs from its log."""
    command = parser()
    options = command.parse_args(arguments)
    if options.output is None and options.verify is None:
        command.error("nothing to do: give --output DIR, --verify CHECKPOINT, or both")
    from ..trajectory.base import check_base
    from ..trajectory.replay import Replay, replay
    from ..trajectory.verify import verify

    start, exit_code = time.perf_counter(), 0
    if options.base is not None:
        same = check_base(Replay(options.log).says, options.base)
        print(f"{options.base} is the base of the run: {same} tensors are the same.")
    if options.verify is not None:
        verdict = verify(options.log, options.verify, options.step)
        print(verdict)
        exit_code = 0 if verdict.right else 1
    if options.output is not None:
        rebuilt = replay(options.log, options.output, options.step)
        print(
            f"{options.output}: the adapter after step {rebuilt.step}, in "
            f"{time.perf_counter() - start:.1f} s."
        )
    return exit_code
