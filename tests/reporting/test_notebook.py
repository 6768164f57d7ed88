"""What a notebook shows of a run."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from transformers.utils import is_in_notebook

from tests.reporting.test_model_card import trainer_of


@pytest.fixture
def shown(monkeypatch):
    """Pretend to be in a notebook; return what it shows."""
    found = []

    class Handle:
        def update(self, what):
            found.append(what)

    def display(what, display_id=False):
        found.append(what)
        return Handle()

    jupyter = ModuleType("IPython")
    jupyter.__spec__ = ModuleSpec("IPython", None)
    jupyter.version_info = (9, 0)  # matplotlib looks
    jupyter.get_ipython = lambda: SimpleNamespace(config={"IPKernelApp": {}})
    jupyter.display = ModuleType("IPython.display")
    vars(jupyter.display).update(display=display, HTML=str, Image=lambda filename: Path(filename))
    monkeypatch.setitem(sys.modules, "IPython", jupyter)
    monkeypatch.setitem(sys.modules, "IPython.display", jupyter.display)
    for name in ("transformers.utils.notebook", "hf_flops.reporting.notebook"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    is_in_notebook.cache_clear()
    yield found
    is_in_notebook.cache_clear()
    for name in ("transformers.utils.notebook", "hf_flops.reporting.notebook"):
        sys.modules.pop(name, None)


def test_a_notebook_counts_rows_and_shows_the_pictures(tmp_path, shown, monkeypatch):
    from transformers.utils.notebook import NotebookProgressCallback

    bar = "transformers.trainer.DEFAULT_PROGRESS_CALLBACK"
    monkeypatch.setattr(bar, NotebookProgressCallback)
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of(tmp_path, disable_tqdm=False, **options)
    trainer.train()
    rows = trainer.ledger.all_rows
    bars = [text for text in shown if isinstance(text, str)]
    assert f"[{rows}/{rows} " in bars[-1]
    assert "rows, step 4/4" in bars[-1]
    assert "Validation Loss" in bars[-1]
    pictures = {path.name for path in shown if isinstance(path, Path)}
    assert pictures == {path.name for path in (tmp_path / "adapter").glob("*.png")} != set()
