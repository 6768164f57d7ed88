"""Where forwards fetch weights, every scale is looked at in one forward."""

from dataclasses import replace

import pytest
import torch

from hf_flops.allocators import Uniform
from hf_flops.autotune.epsilon import GRID, calibrate
from hf_flops.core.chunking import ChunkPlanner
from hf_flops.core.method import Method
from hf_flops.estimators import ESTIMATORS
from hf_flops.objectives import TappedLoss
from hf_flops.perturbations import perturb
from tests.helpers.runs import adapted
from tests.helpers.tiny import double, model_forward, tiny_batch


@pytest.mark.parametrize("estimator", ["one_sided", "antithetic"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "rank_one"])
def test_one_forward_finds_what_a_forward_for_each_scale_finds(estimator, distribution):
    model = adapted("vit", dropout=0.0).double().eval()
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    perturbation = perturb(model, rowwise=names, distribution=distribution)
    planner, forwards = ChunkPlanner(64), [0]
    method = Method(
        TappedLoss(), perturbation, ESTIMATORS[estimator](), Uniform(), 8, 1e-3, planner
    )

    def forward(inputs):
        forwards[0] += 1
        return model_forward(model)(inputs)

    fetching = ChunkPlanner(64)
    fetching.prepare(torch.device("cpu"), 1, fetches=True)
    batch = double(tiny_batch("vit"))
    with torch.no_grad():
        single = calibrate(forward, batch, method)
        many, forwards[0] = forwards[0], 0
        together = calibrate(forward, batch, replace(method, rows_per_forward=fetching))
    assert forwards[0] == 1
    assert many >= len(GRID)
    assert together.scale == single.scale
    assert together.signal_to_noise == pytest.approx(single.signal_to_noise, rel=1e-2)
    assert together.rows == single.rows
