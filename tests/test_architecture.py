"""Who may import whom: packages know those below them, and the engine needs torch only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_flops

PACKAGE = Path(hf_flops.__file__).parent
GROUND = "errors _version base"
STRATEGIES = f"{GROUND} objectives perturbations allocators"
ENGINE = f"{STRATEGIES} estimators reuse distributed core autotune"
# Each package may import those named, and itself.
LAW = {
    "errors": "",
    "_version": "",
    "base": "errors _version",
    "objectives": GROUND,
    "perturbations": GROUND,
    "allocators": GROUND,
    "estimators": STRATEGIES,
    "reuse": STRATEGIES,
    "distributed": STRATEGIES,
    "core": f"{STRATEGIES} estimators reuse distributed",
    "autotune": f"{STRATEGIES} estimators reuse distributed core",
    "testing": STRATEGIES,
    "engines": ENGINE,
    "prompts": f"{ENGINE} engines",
    "trajectory": ENGINE,
    "reporting": ENGINE,
    "contrastive": ENGINE,
    "trainer": f"{ENGINE} prompts engines trajectory reporting contrastive",
    "diagnosis": f"{ENGINE} prompts engines trajectory reporting contrastive trainer",
    "cli": f"{ENGINE} prompts engines trajectory reporting contrastive trainer diagnosis",
}
HUGGING_FACE = {"transformers", "peft", "accelerate", "datasets", "evaluate"}
FILES = sorted(PACKAGE.rglob("*.py"))


def package_of(path):
    """Return the sub-package or module that a file belongs to; "" for the package's `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(tree, path):
    """Yield the dotted name of everything that a file imports, wherever in the file."""
    package = ["hf_flops", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            yield from (".".join([*base, alias.name]) for alias in node.names)


def offences(source, path):
    """Return the imports of a file that the law does not allow."""
    package = package_of(path)
    allowed = {package, *LAW[package].split()}
    found = []
    for name in imports(ast.parse(source), path):
        first, *rest = name.split(".")
        if first == "hf_flops":
            fine = bool(rest) and rest[0] in allowed
        else:
            light = first in sys.stdlib_module_names | {"torch", "numpy"}
            fine = package not in ENGINE.split() or light
        if not fine:
            found.append(name)
    return found


def run_in_a_new_process(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    ).stdout


def test_packages_import_downwards():
    order = list(LAW)
    for package, below in LAW.items():
        assert set(below.split()) <= set(order[: order.index(package)])


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if package_of(path)],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_every_file_imports_what_its_package_may(path):
    assert package_of(path) in LAW, "a new package: say what it may import"
    assert offences(path.read_text(), path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("objectives/base", "from ..allocators import Uniform"),
        ("base/rows", "def late():\n    from ..core.estimate import estimate_gradient"),
        ("core/estimate", "from ..autotune.row_loss_check import two_rows"),
        ("reuse/independence", "import hf_flops.core.estimate"),
        ("trainer/args", "from .. import cli"),
        ("estimators/differences", "from transformers import Trainer"),
        ("perturbations/rules", "def late():\n    import peft.tuners"),
        ("perturbations/noise", "from ..objectives import Forward"),
    ],
)
def test_forbidden_imports_are_seen(path, source):
    assert len(offences(source, PACKAGE / f"{path}.py")) == 1


def test_the_package_itself_imports_nothing_but_its_version():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    lazy = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    own = set(imports(ast.Module(lazy, []), PACKAGE / "__init__.py"))
    outside = {name for name in own if name.split(".")[0] not in sys.stdlib_module_names}
    assert outside == {"hf_flops._version.__version__"}


def test_few_files_lie_in_the_package_itself():
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 4


def test_the_engine_does_not_load_transformers():
    modules = run_in_a_new_process(
        "import sys, hf_flops\n"
        "light = 'torch' not in sys.modules\n"
        "import hf_flops.autotune.session\n"
        "hf_flops.estimate_gradient, hf_flops.CallableObjective\n"
        "print(light, *{name.split('.')[0] for name in sys.modules})"
    ).split()
    assert modules[0] == "True"  # the name alone costs nothing
    assert HUGGING_FACE.isdisjoint(modules)
    assert "torch" in modules


def test_public_names_are_complete_sorted_and_there():
    assert sorted([*hf_flops._HOMES, "__version__"]) == hf_flops.__all__
    assert list(hf_flops._HOMES) == sorted(hf_flops._HOMES)
    for name in hf_flops.__all__:
        assert getattr(hf_flops, name) is not None
    for name, home in hf_flops._HOMES.items():
        assert getattr(hf_flops, name).__module__ == f"hf_flops.{home}"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = hf_flops.nothing


def test_every_error_is_public():
    tree = ast.parse((PACKAGE / "errors.py").read_text())
    assert {node.name for node in tree.body if isinstance(node, ast.ClassDef)} <= set(
        hf_flops.__all__
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_classes_and_functions_have_docstrings(path):
    def bare(node, prefix=""):
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and not child.name.startswith(
                "_"
            ):
                if not ast.get_docstring(child):
                    yield prefix + child.name
                if isinstance(child, ast.ClassDef):
                    yield from bare(child, f"{child.name}.")

    assert list(bare(ast.parse(path.read_text()))) == []
