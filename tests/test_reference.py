"""The pages and help texts that scripts/reference.py writes are those of the code, and complete."""

import dataclasses
import re

import pytest

from hf_flops import FlopsArgumentsMixin, FlopsTrainingArguments
from hf_flops.trainer.presets import CHOICES
from scripts.reference import GROUPS, ROOT, cli_page, options_page, pages

EXAMPLES = {name: example for group in GROUPS.values() for name, (_, example) in group.items()}


PAGES = pages()  # before a test registers an allocator of its own


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_generated_files_are_up_to_date(path):
    assert path.read_text() == PAGES[path], "run: python scripts/reference.py"


def test_every_field_is_on_the_page_once_with_all_its_values():
    fields = [field.name for field in dataclasses.fields(FlopsArgumentsMixin)]
    headings = re.findall(r"^### `(\w+)`$", options_page(), re.MULTILINE)
    assert sorted(headings) == sorted(fields)
    for name, values in CHOICES.items():
        part = options_page().partition(f"### `{name}`")[2].partition("###")[0]
        assert all(f"`{value}`" in part for value in values)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_an_option_is_accepted_and_changes_it(name, tmp_path):
    args = FlopsTrainingArguments(str(tmp_path), use_cpu=True, **{name: EXAMPLES[name]})
    default = FlopsTrainingArguments(str(tmp_path), use_cpu=True)
    assert getattr(args, name) == EXAMPLES[name] != getattr(default, name)


def test_every_option_in_the_help_of_a_recipe_has_a_text_and_a_default():
    for name in ("vit", "prompt_tuning", "alignment"):
        text = (ROOT / "recipes" / "help" / f"{name}.txt").read_text()
        entries = re.findall(r"^  --(\w+)\n((?: {6}.*\n)+)", text, re.MULTILINE)
        assert {name for name, _ in entries} >= {"seed", "lora_parts", "output_dir", "compare"}
        assert [name for name, about in entries if "efault" not in about] == []


def test_the_command_line_page_has_every_option_of_the_doctor():
    assert all(f"`--{name}`" in cli_page() for name in ("model", "peft", "adapter", "data", "json"))
