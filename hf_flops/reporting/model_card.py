"""The model card: how an adapter was trained, what that cost, and how to repeat and cite it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sized
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .._version import __version__
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


# A heading of the stock card under which nobody wrote anything.
_BLANK = re.compile(r"^#+ [^\n]*\n+More information needed\n+", re.MULTILINE | re.IGNORECASE)


def complete_card(
    folder: str,
    settings: str,
    model: object,
    costs: Mapping[str, float],
    tags: str | Iterable[str] | None,
    data: object = None,
    frozen: Collection[str] = (),
) -> None:
    """Add our tags and our sections to the stock card of an output folder.

    Args:
        folder: the output folder.
        settings: the arguments of the run, as a call of their class.
        model: the model.
        costs: see `RunCosts.so_far`.
        tags: what the caller gave, a name or a list of names.
        data: what it was trained on.
        frozen: names of trainable tensors that were held back.
    """
    path = Path(folder, "README.md")
    if not path.is_file():
        return
    card = ModelCard.load(path)
    card.text = without_blanks(card.text)
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
        "\n\n".join(
            [
                card.text.rstrip(),
                *about(model, path.parent.name, data, frozen),
                *sections(settings, costs, pictures(path.parent)),
            ]
        )
        + "\n"
    )
    card.save(path)


def without_blanks(text: str) -> str:
    """Return the text of a stock card without blank sections, and without what is not so."""
    text = _BLANK.sub("", text).replace(" on an unknown dataset.", ".")
    return text.replace("was trained from scratch", "was adapted")


def baseline_card(folder: str, model: object, data: object) -> None:
    """Say in the stock card of an adapter that the stock trainer has trained what it is, and how to
    load it.
    """
    path = Path(folder, "README.md")
    card = ModelCard.load(path)
    sections = [without_blanks(card.text).rstrip(), *about(model, path.parent.name, data)]
    card.text = "\n\n".join(sections) + "\n"
    card.save(path)


def plain_card(folder: str, model: object) -> None:
    """Write the card of a model without a configuration, such as a prompt of a black box, which the
    stock trainer cannot.
    """
    path = Path(folder, "README.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    head = ModelCardData(library_name="hf_flops", tags=list(TAGS))
    title = f"# {path.parent.resolve().name}"
    text = f"A `{type(model).__name__}`, tuned with forward passes only."
    ModelCard(f"---\n{head.to_yaml()}\n---\n\n{title}\n\n{text}\n").save(path)


def about(model: Any, name: str, data: object, frozen: Collection[str] = ()) -> list[str]:
    """Return what a finder of an adapter asks first: what it is, and how to load it."""
    trained = [p for n, p in model.named_parameters() if p.requires_grad and n not in frozen]
    size = sum(p.numel() for p in trained)
    kind, base = type(model).__name__, base_name(model)
    config = next(iter(getattr(model, "peft_config", {}).values()), None)
    adapter = kind if config is None else str(getattr(config.peft_type, "value", config.peft_type))
    rows = {
        "base model": f"`{base}`" if base else "one that was built from a configuration",
        "adapter": f"{adapter}, {size:,} trained numbers in {len(trained)} tensors",
        "data": described(data),
        "trained with": f"`hf_flops` {__version__}",
    }
    table = "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {v} |" for key, v in rows.items())])
    return ["## The adapter", table, "## Load it", f"```python\n{loading(model, base, name)}\n```"]


def plain_model(model: Any) -> Any:
    """Return the model of transformers under an adapter of PEFT or of ours."""
    if type(model).__module__.startswith("hf_flops"):
        model = getattr(model, "base", getattr(model, "model", model))
    return model.get_base_model() if hasattr(model, "peft_config") else model


def base_name(model: object) -> str:
    """Return the name of the model under an adapter; empty if it has none."""
    config = next(iter(getattr(model, "peft_config", {}).values()), None)
    plain = getattr(getattr(plain_model(model), "config", None), "_name_or_path", None)
    return getattr(config, "base_model_name_or_path", None) or plain or ""


def described(data: object) -> str:
    """Return the name of a data set, if it has one, and its number of samples."""
    size = f"{len(data):,} samples" if isinstance(data, Sized) else "a stream"
    name = getattr(getattr(data, "info", None), "dataset_name", None)
    return f"`{name}`, {size}" if name else size


def loading(model: object, base: str, name: str) -> str:
    """Return the lines that load an adapter for inference."""
    source, folder = repr(base or "the base model"), repr(name or ".")
    kind, inner = type(model).__name__, plain_model(model)
    under = type(inner).__name__
    if inner is model and not hasattr(type(model), "from_pretrained"):
        lines = ["from safetensors.torch import load_file", ""]
        lines += [f"model = ...  # a {kind}, built as for training"]
        lines += [f"model.load_state_dict(load_file({f'{name}/model.safetensors'!r}))"]
    elif inner is model:
        lines = [f"from transformers import {kind}", ""]
        lines += [f"model = {kind}.from_pretrained({folder}).eval()"]
    else:
        labels = inner.config.num_labels if "Classification" in under else 2
        options = "" if labels == 2 else f", num_labels={labels}"
        package, kind = (
            ("peft", "PeftModel") if hasattr(model, "peft_config") else ("hf_flops", kind)
        )
        lines = [f"from {package} import {kind}", f"from transformers import {under}", ""]
        lines += [f"base = {under}.from_pretrained({source}{options})"]
        lines += [f"model = {kind}.from_pretrained(base, {folder}).eval()"]
    return "\n".join(lines)


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
        "What repeats the run: the configuration of the adapter, if it has one, and the arguments "
        "that differ from their defaults.",
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
