"""Hypothesis finds the same examples every time; `--shuffle=SEED` or `--shuffle=random` puts tests
in a random order.
"""

import gc
import random
import secrets
from pathlib import Path

import pytest
from hypothesis import settings
from matplotlib.figure import Figure
from transformers import set_seed

# Shared machines are slow at random, and CI must find the same examples every time.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("default")


def pytest_addoption(parser):
    text = "run the tests in the random order that belongs to a seed, or to a new one: random"
    parser.addoption("--shuffle", metavar="SEED", help=text)


def pytest_configure(config):
    # drawn once: workers of xdist get the options of their controller
    if config.option.shuffle == "random":
        config.option.shuffle = str(secrets.randbelow(2**32))


def pytest_report_header(config):
    return (
        []
        if config.option.shuffle is None
        else f"random order of tests: --shuffle={config.option.shuffle}"
    )


# Whoever imports one of these trains, and so feels how the processor rounds.
TRAINERS = {
    "FlopsTrainer",
    "FlopsTrainerMixin",
    "build",
    "doctor",
    "estimate_gradient",
    "one_estimate",
    "short_run",
}


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item):
    if TRAINERS & vars(item.module).keys():
        item.add_marker("trains")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if config.option.shuffle is not None:
        random.Random(config.option.shuffle).shuffle(items)


@pytest.fixture(autouse=True, scope="module")
def _collect_young_objects_only():
    gc.collect()
    # every `train()` collects garbage, which takes long with everything that is imported
    gc.freeze()


@pytest.fixture(autouse=True)
def _global_generators_that_no_other_test_has_moved():
    set_seed(0)


@pytest.fixture
def drawn(monkeypatch):
    """Return the figures that a test saves, by the names of their files."""
    figures, save = {}, Figure.savefig

    def savefig(figure, path, **options):
        figures[Path(path).name] = figure
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures
