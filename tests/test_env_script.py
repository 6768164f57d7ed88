"""scripts/_env with programs in the place of Python and pip that only write down how they were
called.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STUB = """#!/bin/sh
echo "$0 $*" >>"$LOG"
case "$*" in
    -V | --version) echo "Python {version}" ;;
    "-m venv --clear .venv") rm -rf .venv && mkdir -p .venv/bin &&
        cp "$0" .venv/bin/python && cp "$0" .venv/bin/pip ;;
    -c*) exit {fails} ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with what scripts/_env reads, and two Pythons."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/_env", "pyproject.toml", "constraints.txt", "constraints-oldest.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name, version, fails in (
        ("python-a", "3.12.1", 0),
        ("python-b", "3.13.1", 0),
        ("python-old", "3.9.1", 1),
    ):
        path = tmp_path / name
        path.write_text(STUB.format(version=version, fails=fails))
        path.chmod(0o755)
    return tmp_path


def run(checkout, **options):
    """Source the script; returns its result and the calls of Python and pip."""
    log = checkout / "log"
    log.write_text("")
    names = {f"HF_FLOPS_{name.upper()}": value for name, value in options.items()}
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_FLOPS_")}
    result = subprocess.run(
        ["bash", "-c", "source scripts/_env test"],
        cwd=checkout,
        env={**own, **names, "LOG": str(log)},
        capture_output=True,
        text=True,
    )
    return result, log.read_text().splitlines()


def installs(calls):
    """Return the arguments of `pip install` in each call, from the constraints on."""
    return [call.partition("install -qq ")[2] for call in calls if "install -qq" in call]


@pytest.mark.parametrize("constraints", [None, "constraints-oldest.txt", "/dev/null"])
def test_the_constraints_that_are_named_are_those_of_pip(checkout, constraints):
    options = {"constraints": constraints} if constraints else {}
    result, calls = run(checkout, python="./python-a", **options)
    file = constraints or "constraints.txt"
    assert result.returncode == 0, result.stderr
    assert installs(calls) == [
        f"--constraint {file} torch",
        f"--constraint {file} --editable .[test]",
    ]


def test_only_torch_is_looked_up_on_another_index(checkout):
    _, calls = run(checkout, python="./python-a", torch_index="https://example.org/cpu")
    first, second = installs(calls)
    assert first == "--constraint constraints.txt --extra-index-url https://example.org/cpu torch"
    assert "example.org" not in second


def test_what_is_installed_stays_until_something_else_is_asked_for(checkout):
    run(checkout, python="./python-a")
    for options in ({}, {"python": "./python-a"}):
        assert installs(run(checkout, **options)[1]) == []
    assert len(installs(run(checkout, constraints="constraints-oldest.txt")[1])) == 2


def test_a_venv_of_another_python_is_made_anew(checkout):
    run(checkout, python="./python-a")
    _, calls = run(checkout, python="./python-b")
    assert "./python-b -m venv --clear .venv" in calls
    assert len(installs(calls)) == 2


@pytest.mark.parametrize(
    "options", [{"python": "./python-old"}, {"python": "./nowhere"}, {"constraints": "nowhere.txt"}]
)
def test_what_cannot_be_used_is_refused_and_leaves_the_venv(checkout, options):
    run(checkout, python="./python-a")
    result, calls = run(checkout, **options)
    ((name, value),) = options.items()
    assert result.returncode == 1
    assert f"HF_FLOPS_{name.upper()}={value} is not" in result.stderr
    assert not any("venv" in call.split() or "install" in call for call in calls)
    assert (checkout / ".venv" / "bin" / "pip").exists()
