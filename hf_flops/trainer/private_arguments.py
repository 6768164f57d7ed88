"""Keeps secrets among the arguments of a run out of what it writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

_SECRETS = ("hub_token", "push_to_hub_token")


@contextmanager
def private(args: TrainingArguments, folder: str) -> Iterator[None]:
    """Let the arguments be pickled inside the context without the Hub's token, where they have one,
    into a file that only its owner may read.
    """
    secrets = {name: token for name in _SECRETS if (token := getattr(args, name, None))}
    if not secrets or not args.should_save:
        yield
        return
    path = Path(folder, TRAINING_ARGS_NAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    path.chmod(0o600)
    try:
        for name in secrets:
            setattr(args, name, None)
        yield
    finally:
        for name, token in secrets.items():
            setattr(args, name, token)
