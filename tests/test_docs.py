"""The code blocks of README and docs run as they stand, each file's in one go; their links lead
somewhere.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python\n" in page.read_text()]
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


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert "estimate_gradient" in (tmp_path / "api" / "index.html").read_text()
