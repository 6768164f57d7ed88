"""`hf-flops prompt`: tune a prompt of a language model; the recipe of the same name."""

from __future__ import annotations

from .recipe import run


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe with arguments, or with the YAML file that they name."""
    return run("prompt_tuning", "prompt", arguments)
