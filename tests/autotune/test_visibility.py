"""An engine whose rounding swallows the noise is told from one whose loss curves."""

import pytest
import torch
from torch import nn

from hf_flops import CallableObjective, ConfigurationError
from hf_flops.autotune.visibility import require_visible
from tests.autotune.test_epsilon import method
from tests.helpers.tiny import generator


def looked_at(loss):
    model = nn.Linear(3, 1)
    inputs = {"features": torch.randn(5, 3, generator=generator())}
    start = model(inputs["features"]).detach()

    def forward(rows):
        moves = model(rows["features"]) - start[rows["place"]]
        return None, loss(moves.squeeze(1))

    objective = CallableObjective(lambda outputs, inputs: outputs)
    chosen = method(model, objective=objective, scale=1e-1)
    with torch.no_grad():
        return require_visible(forward, {**inputs, "place": torch.arange(5)}, chosen)


@pytest.mark.parametrize(
    "loss",
    [
        lambda moves: 7e-3 * (moves > 1e-6).float(),  # the same step at all scales
        lambda moves: 4e-1 * (moves / 4e-1).round(),  # nothing at the smaller scales
    ],
)
def test_rounding_is_refused_though_deltas_correlate(loss):
    with pytest.raises(ConfigurationError, match=r"scale=0.1 is lost in the engine's rounding"):
        looked_at(loss)


@pytest.mark.parametrize("loss", [lambda moves: moves, lambda moves: moves + 20 * moves.square()])
def test_a_smooth_loss_is_not_refused_if_it_curves(loss):
    assert looked_at(loss) == 4 + 3 * 16
