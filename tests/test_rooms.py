"""Who may import whom: the engine needs torch only, and its parts do not know each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_flops

PACKAGE = Path(hf_flops.__file__).parent
# Each room may import the rooms of lower floors; those of the ground floor may also import each
# other.
FLOORS = {
    **dict.fromkeys(
        [
            "errors",
            "counters",
            "_version",
            "rows",
            "memory",
            "padding",
            "losses",
            "share",
            "launch",
            "probe_runs",
        ],
        0,
    ),
    **dict.fromkeys(["similarity", "probe_runs"], 0),
    "line_search": 1,
    **dict.fromkeys(
        ["objectives", "perturbations", "estimators", "allocators", "metrics", "reuse", "chunks"], 1
    ),
    **dict.fromkeys(["replayable", "baselines"], 1),
    **dict.fromkeys(["heads", "control_variates", "regenerate", "contrastive", "noise_sum"], 2),
    **dict.fromkeys(["exchange", "delta_chain"], 3),
    "method": 4,
    **dict.fromkeys(["clean", "queries"], 5),
    **dict.fromkeys(
        ["step", "selfcheck", "independence", "last_logits", "prefix_cache", "trimming"], 6
    ),
    **dict.fromkeys(
        [
            "args",
            "calibration",
            "ledger",
            "plots",
            "precision",
            "texts",
            "setup",
            "state",
            "auto_queries",
        ],
        7,
    ),
    **dict.fromkeys(["towers", "image_text", "visual_prompts"], 7),
    **dict.fromkeys(
        ["blackbox", "budget", "checks", "packing", "rewards", "tuning", "checkpoints"], 8
    ),
    **dict.fromkeys(["costs", "progress", "run_plots", "settings", "trajectory"], 8),
    **dict.fromkeys(["pictures", "suffix", "sessions", "processes", "throwaway", "f1"], 9),
    **dict.fromkeys(["cards", "watching", "alignment", "learning_rate"], 10),
    **dict.fromkeys(["pair_steps", "trial_rate"], 11),
    "trainer": 12,
    "diagnosis": 13,
    "testing": 14,
    "commands": 14,
    "cli": 15,
}
ENGINE = {room for room, floor in FLOORS.items() if floor <= 6}
HUGGING_FACE = {"transformers", "peft", "accelerate", "datasets", "evaluate"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    """Return the module, or the sub-package, that a file belongs to; "" for the package's own
    `__init__`.
    """
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
    """Return the imports of a file that its floor does not allow."""
    room = room_of(path)
    floor = FLOORS[room]
    found = []
    for name in imports(ast.parse(source), path):
        first, *rest = name.split(".")
        if first == "hf_flops":
            other = rest[0] if rest else ""
            below = FLOORS.get(other, 99) < floor or (floor == 0 and FLOORS.get(other) == 0)
            allowed = other == room or below
        else:
            allowed = room not in ENGINE or first in sys.stdlib_module_names | {"torch", "numpy"}
        if not allowed:
            found.append(name)
    return found


def run_in_a_new_process(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    ).stdout


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if room_of(path)],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_every_file_imports_from_lower_floors_only(path):
    assert room_of(path) in FLOORS, "a new module: give it a floor"
    assert offences(path.read_text(), path) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("objectives", "from .allocators import Uniform"),
        ("rows", "def late():\n    from .step import Place"),
        ("step", "from .selfcheck import two_rows"),
        ("selfcheck", "import hf_flops.core.estimate"),
        ("args", "from . import trainer"),
        ("estimators", "from transformers import Trainer"),
        ("perturbations/rules", "def late():\n    import peft.tuners"),
        ("perturbations/noise", "from ..objectives import Forward"),
    ],
)
def test_forbidden_imports_are_seen(room, source):
    assert len(offences(source, PACKAGE / f"{room}.py")) == 1


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


def test_the_engine_does_not_load_transformers():
    modules = run_in_a_new_process(
        "import sys, hf_flops\n"
        "light = 'torch' not in sys.modules\n"
        "import hf_flops.autotune.rule_check\n"
        "hf_flops.estimate_gradient, hf_flops.CallableObjective\n"
        "print(light, *{name.split('.')[0] for name in sys.modules})"
    ).split()
    assert modules[0] == "True"  # the name alone costs nothing
    assert HUGGING_FACE.isdisjoint(modules)
    assert "torch" in modules


def test_public_names_are_complete_sorted_and_there():
    assert sorted([*hf_flops._HOMES, "__version__"]) == hf_flops.__all__
    assert list(hf_flops._HOMES) == sorted(hf_flops._HOMES)
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
