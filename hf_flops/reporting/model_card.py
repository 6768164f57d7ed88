"""The model card: how an adapter was trained, what that cost, and how to repeat and cite it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import ModelCard

from .figures import PICTURES

TAGS = ("hf-flops", "forward-only", "zeroth-order")
CITATION = """@inproceedings{ren2025flops,
  title = {{FLOPS}: Forward Learning with {OPtimal} Sampling},
  author = {Ren, Tao and Zhang, Zishi and Jiang, Jinyang and Li, Guanghao and Zhang, Zeliang and
            Feng, Mingqian and Peng, Yijie},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  eprint = {2410.05966},
  archivePrefix = {arXiv},
}"""


def complete_card(
    folder: str,
    settings: str,
    model: object,
    costs: Mapping[str, float],
    tags: str | Iterable[str] | None,
) -> None:
    """Add our tags and our sections to the stock card of an output folder.

    Args:
        folder: the output folder.
        settings: the arguments of the run, as a call of their class.
        model: the model.
        costs: see `RunCosts.so_far`.
        tags: what the caller gave, a name or a list of names.
    """
    path = Path(folder, "README.md")
    if not path.is_file():
        return
    card = ModelCard.load(path)
    card.data.tags = sorted(
        {
            *(card.data.tags or []),
            *([tags] if isinstance(tags, str) else tags or []),
            *(getattr(model, "model_tags", None) or []),
            *TAGS,
            "generated_from_trainer",
        }
    )
    # an empty name, of a model made from its configuration, is refused by the Hub
    if not card.data.get("base_model"):
        card.data.pop("base_model", None)
    card.text = (
        "\n\n".join([card.text.rstrip(), *sections(settings, costs, pictures(path.parent))]) + "\n"
    )
    card.save(path)


def pictures(folder: Path) -> list[tuple[str, str]]:
    """Return (file, caption) of the pictures that lie in an output folder."""
    return [(name, caption) for name, caption in PICTURES.items() if (folder / name).is_file()]


def sections(
    settings: str, costs: Mapping[str, float], drawn: Iterable[tuple[str, str]]
) -> list[str]:
    """Return the parts of a card that forward-only training adds.

    Args:
        settings: the arguments of the run, as a call of their class.
        costs: see `RunCosts.so_far`.
        drawn: (file, caption) of pictures beside the card.
    """
    parts = [
        "## Forward-only training",
        "This adapter was trained by `hf_flops` with forward passes only: its gradient was "
        "estimated from perturbed rows, without backpropagation "
        "([FLOPS](https://arxiv.org/abs/2410.05966)).",
    ]
    if costs["rows"]:
        parts += ["### What it cost", cost_table(costs)]
    if shown := [f"![{caption}]({name})" for name, caption in drawn]:
        parts += ["### Pictures", *shown]
    return [
        *parts,
        "### Settings",
        "The arguments that differ from their defaults:",
        f"```python\n{settings}\n```",
        "## Citation",
        f"```bibtex\n{CITATION}\n```",
    ]


def cost_table(costs: Mapping[str, float]) -> str:
    """Return what a run cost as a table in Markdown; see `RunCosts.so_far`."""
    checks = f" ({costs['check_rows']:,} of them to check the first batch)"
    lines = {"rows through the model": f"{costs['rows']:,}{checks if costs['check_rows'] else ''}"}
    if costs["tokens"]:
        lines["tokens, padding included"] = f"{costs['tokens']:,}"
    lines["seconds"] = f"{costs['seconds']:,.1f}"
    if "peak_memory" in costs:
        lines["peak memory of the process"] = f"{costs['peak_memory'] / 2**20:,.0f} MB"
    return "\n".join(
        ["| | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in lines.items())]
    )
