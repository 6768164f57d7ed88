"""A step needs little more memory than inference of the same rows, counted tensor by tensor."""

import math
import weakref
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_flops import BatchPosition, Method, estimate_gradient
from hf_flops.allocators import Optimal
from hf_flops.base.batch import take
from hf_flops.base.memory import PeakMemory
from hf_flops.estimators import OneSided
from hf_flops.objectives import TappedLoss
from hf_flops.perturbations import DISTRIBUTIONS, ParameterVector, perturb
from tests.helpers.tiny import model_forward, tiny_batch, tiny_model


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made and that are still alive, and their
    peak.
    """

    def __init__(self):
        super().__init__()
        self.tensors, self.bytes, self.peak = Counter(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.untyped_storage().nbytes():
                self._add(tensor)
        return out

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        self.bytes += size * (self.tensors[key] == 0)
        self.tensors[key] += 1
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(tensor, self._remove, key, size)

    def _remove(self, key, size):
        self.tensors[key] -= 1
        self.bytes -= size * (self.tensors[key] == 0)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_step_needs_the_memory_of_inference_and_little_more(distribution):
    rows, sizes = 64, {"hidden_size": 64, "intermediate_size": 256, "image_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(
            tiny_model("vit", **sizes), LoraConfig(r=64, target_modules=["q_proj", "v_proj"])
        ).eval()
    inputs = tiny_batch("vit", samples=16)
    inputs["pixel_values"] = torch.nn.functional.interpolate(inputs["pixel_values"], size=(32, 32))
    vector = ParameterVector.of(model)
    with torch.no_grad(), LiveBytes() as inference:
        model(**take(inputs, torch.arange(rows) % 16))
    parts = {
        "perturbation": perturb(model, rowwise=vector.names, distribution=distribution),
        "estimator": OneSided(),
        "allocator": Optimal(),
    }
    method = Method(TappedLoss(), queries_per_sample=9, scale=1e-3, rows_per_forward=rows, **parts)
    with LiveBytes() as step:
        result = estimate_gradient(model_forward(model), inputs, method, BatchPosition())
    assert result.rows == 16 * 9
    dense = 4 * rows * vector.size  # what unpacked noise would take
    assert step.peak <= 1.1 * inference.peak + 1.1 * dense * (distribution == "gaussian")
    assert dense > 0.5 * inference.peak


def test_the_peak_of_a_process_is_measured():
    with PeakMemory() as memory:
        torch.ones(64 * 2**20).sum()  # 256 MB
    if math.isnan(memory.megabytes):
        pytest.skip("the system does not tell")
    assert 250 < memory.megabytes < 400
