"""What all subcommands read their arguments with."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn


class CommandParser(argparse.ArgumentParser):
    """A parser that names the nearest option where one is not known.

    Examples:
        >>> parser = CommandParser(prog="hf-flops doctor", exit_on_error=False)
        >>> option = parser.add_argument("--model")
        >>> parser.nearest("--modle")
        '--model'
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.known: list[str] = []
        super().__init__(*args, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument."""
        self.known += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **options)

    def nearest(self, name: str) -> str | None:
        """Return the known option that is most like a name, if one is."""
        option = name.partition("=")[0].replace("-", "_").replace("__", "--", 1)
        return next(iter(difflib.get_close_matches(option, self.known, n=1)), None)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """Read the arguments, and refuse what is not known."""
        options, others = self.parse_known_args(args, namespace)
        if others:
            self.refuse(others[0])
        return options

    def refuse(self, name: str) -> NoReturn:
        """End with the sentence for an option that is not known."""
        near = self.nearest(name) if name.startswith("-") else None
        self.error(f"{name} is no option: {f'did you mean {near}?' if near else 'see --help'}")
