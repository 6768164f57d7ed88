"""docs/peft-support.md is what the script that wrote it finds."""

import re

import peft
import pytest

from scripts.peft_methods import KINDS, methods
from scripts.peft_support import PAGE, cell, examine

other = f"PEFT {peft.__version__}," not in PAGE.read_text()
pytestmark = pytest.mark.skipif(other, reason="the page tells of another release of PEFT")


def committed():
    """Return the page's cells by row and model, each with its notes written out."""
    page = PAGE.read_text()
    notes = dict(re.findall(r"^(\d+)\. (.*)$", page, re.MULTILINE))
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")][
        2:
    ]
    written = [
        [re.sub(r"\[(\d+)\]", lambda match: notes[match[1]], text) for text in row] for row in rows
    ]
    return {row[0]: dict(zip(KINDS, row[1:], strict=True)) for row in written}


def test_every_method_of_the_release_has_a_row():
    assert list(committed()) == [row for row, _, _ in methods()]


@pytest.mark.filterwarnings("ignore")  # whatever PEFT says while it builds adapters
@pytest.mark.parametrize(
    ("row", "kind"),
    [("LORA, DoRA", "bert"), ("IA3", "vit"), ("OFT", "llama"), ("LILY", "vit"), ("CPT", "bert")],
)
def test_the_page_is_what_the_script_finds(row, kind):
    name, options = next((name, options) for found, name, options in methods() if found == row)
    notes = []
    text = cell(examine(kind, name, options), notes)
    text = re.sub(r"\[(\d+)\]", lambda match: notes[int(match[1]) - 1], text)
    assert text == committed()[row][kind]
