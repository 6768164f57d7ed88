import gc

import pytest
from hypothesis import settings

# Shared machines are slow at random, and CI must find the same examples every time.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("default")


@pytest.fixture(scope="module")
def collect_young_objects_only():
    gc.freeze()  # every `train()` collects garbage, which takes long with everything that is imported
    yield
    gc.unfreeze()
