"""The command `hf-flops`: a table of subcommands, which are imported when they are called."""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
from collections.abc import Callable
from importlib import import_module

from .._version import __version__
from ..errors import FlopsError

# name: (module and function, `function(arguments) -> exit code`; what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "vit": ("recipes:vit", "adapt a vision transformer to new classes with forward passes only"),
    "prompt": ("recipes:prompt", "tune a prompt of a language model with forward passes only"),
    "align": (
        "recipes:align",
        "align images with texts, or classify images by sentences, with forward passes only",
    ),
    "compare": ("compare:main", "presets side by side on one task at the same rows"),
    "doctor": (
        "doctor:main",
        "what training would do with a model, a method and data, and a learning rate to begin with",
    ),
    "plot": (
        "plot:main",
        "pictures of a run: learning curve, where the queries went, signal to noise",
    ),
    "replay": (
        "replay:main",
        "rebuild an adapter from its trajectory log, or verify a checkpoint against it",
    ),
}


def parser() -> argparse.ArgumentParser:
    """Return what reads the name of the subcommand; the subcommand reads the rest."""
    width = max(map(len, COMMANDS)) + 2
    table = "\n".join(f"  {name:<{width}}{what}" for name, (_, what) in COMMANDS.items())
    command = argparse.ArgumentParser(
        prog="hf-flops",
        description="Fine-tune PEFT adapters with forward passes only.",
        epilog=f"commands:\n{table}\n\n`hf-flops COMMAND --help` tells more of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--version", action="version", version=__version__)
    command.add_argument("command", nargs="?", metavar="COMMAND", help="what to do")
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    return command


def function(command: str) -> Callable[[list[str]], int]:
    """Import and return what runs a subcommand."""
    module, _, name = COMMANDS[command][0].partition(":")
    return getattr(import_module(f".{module}", __package__), name)


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; returns 0 for success, 1 for an error that the message explains."""
    command = parser()
    options = command.parse_args(arguments)
    if options.command is None:
        command.print_help()
        return 0
    if options.command not in COMMANDS:
        near = difflib.get_close_matches(options.command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose among {', '.join(COMMANDS)}"
        command.error(f"{options.command} is no command: {hint}")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return function(options.command)(options.arguments)
    except ModuleNotFoundError as error:
        reason = (
            f"{error.name} is not installed: pip install 'hf_flops[recipes]' installs all that the "
            "commands need."
        )
    except (FlopsError, ImportError) as error:  # an ImportError of ours names the extra
        reason = str(error)
    except KeyboardInterrupt:
        reason = "interrupted."
    print(f"hf-flops {options.command}: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
