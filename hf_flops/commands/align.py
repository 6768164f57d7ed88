"""`hf-flops align`: align images with texts; the recipe called alignment."""

from __future__ import annotations

from .recipe import run


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe with arguments, or with the YAML file that they name."""
    return run("alignment", "align", arguments)
