"""The code blocks of README and docs run as they stand, each file's in one go; their links lead
somewhere.
"""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_flops
from hf_flops import FlopsArgumentsMixin
from hf_flops.reporting.figures import PICTURES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIAL = ROOT / "docs" / "tutorial.md"  # runs as a notebook
WITH_CODE = [page for page in PAGES if "```python\n" in page.read_text() and page != TUTORIAL]
TEXTS = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]


def anchors(page):
    """Return the names that the headings of a page can be linked by."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE
    )
    return {
        re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-")
        for heading in headings
    }


def broken(page, text):
    """Return the relative links of a page's text that lead nowhere."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        path, _, anchor = target.partition("#")
        if re.match("[a-z]+:", target):
            continue
        place = page.parent / path if path else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # a notebook is the user's
def test_the_notebook_of_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for cell in json.loads((ROOT / "examples" / "tutorial.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "tutorial.ipynb", "exec"), namespace)
    before, after = namespace["before"], namespace["after"]
    assert after > before + 0.1
    assert f"accuracy: {before:.1%} before, {after:.1%} after" in capsys.readouterr().out
    bad, good = namespace["logits"].softmax(-1)[:, 1].flip(0)
    assert bad < good
    found = {path.name for path in (tmp_path / "outputs" / "reviews").iterdir()}
    assert found >= {*PICTURES, "README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    assert broken(page, page.read_text()) == []


def test_broken_links_are_seen():
    links = ["nowhere.md", "docs/step.md#no-such-heading", "#no-such-heading"]
    text = " ".join(
        f"[a]({link})"
        for link in [*links, "docs/step.md", "https://example.org", "docs/choosing.md#budget"]
    )
    assert broken(ROOT / "README.md", text) == links


def test_the_site_has_every_page_and_no_other():
    pages = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(pages) == sorted(page.name for page in PAGES[1:])


def test_the_site_builds_without_a_warning_and_search_finds_every_name(tmp_path):
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    index = json.loads((tmp_path / "search" / "search_index.json").read_text())
    titles = set(re.findall(r"\w+", " ".join(page["title"] for page in index["docs"])))
    fields = {field.name for field in dataclasses.fields(FlopsArgumentsMixin)}
    assert {*hf_flops.__all__, *fields} - titles == {"__version__"}
