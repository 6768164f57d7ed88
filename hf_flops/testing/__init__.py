"""Contract tests: derive a class that makes an instance of yours, and run pytest.

    from hf_flops.testing import AllocatorContract

    class TestMine(AllocatorContract):
        def make(self):
            return Mine()

The library's own classes pass the same contracts.
"""

from .allocators import AllocatorContract
from .engines import EngineContract
from .objectives import ObjectiveContract
from .perturbations import PerturbationContract

__all__ = ["AllocatorContract", "EngineContract", "ObjectiveContract", "PerturbationContract"]
