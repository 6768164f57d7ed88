"""`hf-flops compare`: presets side by side on one task at the same rows; a table and a picture."""

from __future__ import annotations

from .parsers import CommandParser
from .recipes import run

PRESETS = ("flops", "mezo", "flops-authors")


def parser() -> CommandParser:
    """Return what reads the arguments; those that it does not know are the recipe's."""
    command = CommandParser(
        prog="hf-flops compare",
        description="Train the same adapter on the same images with several presets, each with "
        "the same number of rows through the model, and write a table (report.md, results.json) "
        "and a picture (report.png).",
        epilog="Other options go to the recipe, such as --dataset, --model or --seed: see "
        "hf-flops vit --help.",
    )
    command.add_argument(
        "--presets",
        nargs="+",
        default=list(PRESETS),
        help=f"what to compare, 'backprop' too; default: {' '.join(PRESETS)}",
    )
    command.add_argument(
        "--rows", type=int, help="rows of each run, checks included; default: all of the epochs"
    )
    command.add_argument(
        "--output_dir",
        default="outputs/compare",
        help="folder of table and picture; default: %(default)s",
    )
    return command


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe once for each preset."""
    command = parser()
    options, others = command.parse_known_args(arguments)
    if wrong := [preset for preset in options.presets if preset not in (*PRESETS, "backprop")]:
        command.error(
            f"--presets {wrong[0]} is unknown: choose among {', '.join((*PRESETS, 'backprop'))}"
        )
    if options.rows is not None and "backprop" in options.presets:
        command.error(
            "--rows bounds forward-only runs; leave 'backprop' out, or give --num_train_epochs "
            "instead"
        )
    for option in others:
        name = option.partition("=")[0].replace("-", "_")
        if len(name) > 3 and any(
            taken.startswith(name) for taken in ("__compare", "__method", "__max_queries")
        ):
            command.error(f"{option} is set by --presets and --rows: give those")
    if others and not others[0].startswith("-"):
        command.error(
            f"{others[0]} is not understood: options begin with --, and a YAML file is for "
            "hf-flops vit"
        )
    first, *more = options.presets
    recipe_options = ["--method", first, "--output_dir", options.output_dir]
    recipe_options += ["--compare", *more] if more else []
    recipe_options += [] if options.rows is None else ["--max_queries", str(options.rows)]
    return run("vit", "compare", [*recipe_options, *others])
