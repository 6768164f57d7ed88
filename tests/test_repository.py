"""The files around the code: they parse, and agree with pyproject.toml, scripts/ and each other."""

import os
import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import hf_flops

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
FORMS = [ROOT / ".github" / "ISSUE_TEMPLATE" / name for name in ("bug.yml", "feature.yml")]
YAML = [
    ROOT / "CITATION.cff",
    ROOT / "mkdocs.yml",
    ROOT / ".pre-commit-config.yaml",
    *sorted((ROOT / ".github").rglob("*.yml")),
    *sorted((ROOT / "recipes").rglob("*.yaml")),
]
PACKAGE = Path(hf_flops.__file__).parent


def load(path):
    """Return what a YAML file says; it reads the key `on` as true."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def workflow():
    """Return the jobs of the workflow, each with the entries of its matrix."""
    jobs = load(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    for job in jobs.values():
        matrix = job["strategy"]["matrix"]
        yield (
            job,
            [
                *matrix.get("include", []),
                *({"python": python} for python in matrix.get("python", [])),
            ],
        )


def pins(name):
    """Return the version of each distribution in a file of constraints."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = [line.split("==") for line in lines if line]
    return {canonicalize_name(name): Version(version) for name, version in found}


def requirements(*extras):
    """Return what the library requires, by itself and with extras."""
    lines = [
        *PROJECT["dependencies"],
        *(r for name in extras for r in PROJECT["optional-dependencies"][name]),
    ]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("path", YAML, ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_files_hold_a_mapping(path):
    assert isinstance(load(path), dict)


def test_the_citation_is_complete_and_of_this_version():
    citation = load(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "license", "version"} <= set(citation)
    assert citation["version"] == hf_flops.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    (paper,) = citation["references"]
    arxiv = paper["url"].rpartition("/")[2]
    assert paper["doi"].endswith(arxiv)
    assert arxiv in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("url", ["", "https://example.org/hf_flops"])
def test_the_readme_of_the_package_has_no_relative_links(url, tmp_path, monkeypatch):
    for name in ("setup.py", "README.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    urls = f'[project.urls]\nrepository = "{url}"\n' if url else ""
    (tmp_path / "pyproject.toml").write_text(f"[project]\n{urls}")
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    runpy.run_path(str(tmp_path / "setup.py"))
    text = given["long_description"]
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert [target for target in targets if not re.match("https:|#", target)] == []
    assert (f"({url}/blob/main/docs/tutorial.md)" in text) == bool(url)
    assert "[The tutorial]" in text if url else "The tutorial explains" in text


def test_the_changelog_begins_with_what_is_not_released_and_this_version():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = load(ROOT / "CITATION.cff")["date-released"]
    assert headings[:2] == ["[Unreleased]", f"[{hf_flops.__version__}] - {released}"]


def test_contributing_names_the_scripts_that_are_there_and_no_other():
    named = set(re.findall(r"\bscripts/[\w.-]*\w", CONTRIBUTING))
    there = {
        f"scripts/{path.name}"
        for path in (ROOT / "scripts").iterdir()
        if os.access(path, os.X_OK) and path.is_file()
    }
    assert there <= named
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_contributing_names_every_package_and_no_other():
    there = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)/` \|", CONTRIBUTING, re.MULTILINE)) == there


def test_the_files_of_contributing_are_there():
    named = set(re.findall(r"`((?:hf_flops|recipes|docs|tests)/[\w/.-]+)`", CONTRIBUTING))
    assert {name for name in named if "NAME" not in name and not (ROOT / name).exists()} == set()


def test_the_diffs_of_contributing_fit():
    """Every line that a diff leaves as it is stands in its file, in this order."""
    text = "".join(re.findall(r"```diff\n(.*?)```", CONTRIBUTING, re.DOTALL))
    changes = re.findall(r"^--- a/.*\n\+\+\+ b/(.*)\n((?:(?!---).*\n)*)", text, re.MULTILINE)
    assert changes
    for name, diff in changes:
        lines = (ROOT / name).read_text().splitlines()
        places = [lines.index(line[1:]) for line in diff.splitlines() if line.startswith(" ")]
        assert places == sorted(places)


def test_pre_commit_runs_the_commands_of_scripts_check():
    check = (ROOT / "scripts" / "check").read_text().splitlines()
    commands = [line.removesuffix(" --check") for line in check if line.startswith(".venv/bin/")]
    hooks = [
        hook for repo in load(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]
    ]
    assert [hook["entry"] for hook in hooks] == commands
    programs = {Path(shlex.split(hook["entry"])[0]).name for hook in hooks}
    assert programs <= {requirement.name for requirement in requirements("dev")}
    assert {repo["repo"] for repo in load(ROOT / ".pre-commit-config.yaml")["repos"]} == {"local"}


def test_the_workflow_tests_every_python_that_is_declared():
    pythons = [entry["python"] for _, matrix in workflow() for entry in matrix]
    prefix = "Programming Language :: Python :: 3."
    declared = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if c.startswith(prefix)}
    assert set(pythons) == declared
    assert min(declared, key=Version) == PROJECT["requires-python"].removeprefix(">=")


def test_the_workflow_runs_files_that_are_there_with_variables_that_are_read():
    read = set(re.findall(r"\$\{(HF_FLOPS_\w+)", (ROOT / "scripts" / "_env").read_text()))
    file = ROOT / ".github" / "workflows" / "ci.yml"
    assert set(re.findall(r"\bHF_FLOPS_\w+", file.read_text())) == read
    assert read <= set(re.findall(r"\bHF_FLOPS_\w+", CONTRIBUTING))
    for job, matrix in workflow():
        (command,) = [step["run"] for step in job["steps"] if "run" in step]
        assert (ROOT / command.split()[-1]).is_file()
        assert all(
            (ROOT / entry.get("constraints", "constraints.txt")).exists() for entry in matrix
        )


def test_the_oldest_versions_are_the_lower_bounds():
    bounds = {}
    for requirement in requirements():
        (lower,) = [s.version for s in requirement.specifier if s.operator == ">="]
        bounds[canonicalize_name(requirement.name)] = Version(lower)
    assert pins("constraints-oldest.txt") == bounds


def test_the_pinned_versions_are_allowed():
    pinned, own = pins("constraints.txt"), PROJECT["name"]
    for requirement in requirements("test", "dev", "vision", "llm", "plots"):
        if requirement.name != own:
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms_ask_for_something_once(path):
    form = load(path)
    assert form["name"]
    assert form["description"]
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in asked}) == len(asked)
    assert all(
        part["type"] in {"input", "textarea"} and part["attributes"]["label"] for part in asked
    )
    assert any(part.get("validations", {}).get("required") for part in asked)


def test_the_glossary_defines_each_term_once_in_order():
    text = (ROOT / "docs" / "glossary.md").read_text()
    terms = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert terms == sorted(set(terms))
    definitions = re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]
    long = [
        t
        for t, d in zip(terms, definitions, strict=True)
        if len(re.findall(r"\.(?:\s|$)", d)) not in (1, 2)
    ]
    assert long == []
