"""The examples in docstrings run as they stand, and names that users call have one."""

import doctest
import importlib
from pathlib import Path

import pytest

import hf_flops

PACKAGE = Path(hf_flops.__file__).parent
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text()
]
CALLED = [name for name, home in hf_flops._HOMES.items() if home != "errors"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failures, examples = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.ELLIPSIS
    )
    assert examples
    assert not failures


@pytest.mark.parametrize("name", sorted(CALLED))
def test_what_users_call_has_an_example(name):
    assert ">>> " in getattr(hf_flops, name).__doc__
