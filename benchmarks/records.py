"""What every benchmark does before and after it measures: be quiet, and keep what was found beside
its environment.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parent.parent


def quiet() -> None:
    """Switch warnings and progress bars off, which would mix with tables."""
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


class Record:
    """The results of a benchmark in `results/<name>.json`; entries that are not measured again
    stay.

    Attributes:
        entries: name → what was found, with the commit that the run started from, torch's version
            and the threads.
    """

    def __init__(self, name: str, indent: int | None = 1) -> None:
        self.path, self.indent = ROOT / "benchmarks" / "results" / f"{name}.json", indent
        self.entries: dict[str, Any] = (
            json.loads(self.path.read_text()) if self.path.is_file() else {}
        )
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        self.environment = {
            "commit": commit,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }

    def keep(self, name: str, found: dict[str, Any]) -> None:
        """Write an entry to the file."""
        self.path.parent.mkdir(exist_ok=True)
        if self.path.is_file():  # another run may have written meanwhile
            self.entries = json.loads(self.path.read_text())
        self.entries[name] = {**found, **self.environment}
        self.path.write_text(json.dumps(self.entries, indent=self.indent))


class SharedRecord(Record):
    """Results that several processes fill at once."""

    def read(self) -> dict[str, Any]:
        """Return the entries as they are in the file now."""
        return json.loads(self.path.read_text()) if self.path.is_file() else {}

    @contextmanager
    def changed(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield an entry to be changed, and write the file when the context ends."""
        self.path.parent.mkdir(exist_ok=True)
        lock = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.entries = self.read()
            entry = self.entries.setdefault(name, {})
            yield entry
            entry.update(self.environment)
            new = self.path.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(self.entries, indent=self.indent))
            new.replace(self.path)
        finally:
            os.close(lock)  # which unlocks
