"""Noise per row of norms over channels, recurrent layers, and parameters that no layer owns."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_flops.autotune.rule_check import choose_perturbation
from hf_flops.objectives import CallableObjective
from hf_flops.perturbations import NoiseKeys, ParameterVector, RowwiseNoise, SharedNoise, displaced

ROWS = 3


class Scaled(nn.Module):
    """Multiplies by a vector, and puts a token in front, as vision transformers do."""

    def __init__(self):
        super().__init__()
        self.scale, self.token = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(1, 1, 4))
        self.factor = nn.Parameter(torch.rand(()))

    def forward(self, x):
        return torch.cat([self.token.expand(len(x), -1, -1), self.factor * x * self.scale], 1)


class Mixing(nn.Module):
    """Has a parameter whose function takes one matrix for all rows."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.rand(4, 4))

    def forward(self, x):
        return F.linear(x, self.matrix)


class Recurrent(nn.Module):
    """Returns the outputs and the last states."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layer = kind(4, 2, 2, **options)

    def forward(self, x):
        states = torch.ones(2 * (1 + self.layer.bidirectional), len(x), 2)
        hx = (states, -states) if isinstance(self.layer, nn.LSTM) else states
        output, last = self.layer(x if self.layer.batch_first else x.transpose(0, 1), hx)
        output = output if self.layer.batch_first else output.transpose(0, 1)
        last = last[0] + last[1] if isinstance(last, tuple) else last
        return torch.cat([output.flatten(1), last.transpose(0, 1).flatten(1)], 1)


MODELS = {
    "batch norm": lambda: nn.BatchNorm1d(5),
    "batch norm, images": lambda: nn.Sequential(nn.Unflatten(1, (5, 1)), nn.BatchNorm2d(5)),
    "group norm": lambda: nn.GroupNorm(5, 5),
    "bare": Scaled,
    "gru": lambda: Recurrent(nn.GRU, batch_first=True),
    "lstm": lambda: Recurrent(nn.LSTM),
    "lstm, both ways": lambda: Recurrent(nn.LSTM, bidirectional=True, batch_first=True),
}


def moved_off(model):
    """Give running statistics values of their own."""
    for name, values in model.named_buffers():
        if values.is_floating_point():
            values.copy_(torch.linspace(0.5, 2.0, len(values)) * (1 + ("var" in name)))
    return model.eval()


def make(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return moved_off(build()), torch.randn(ROWS, 5, 4)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_rows_have_the_outputs_of_changed_parameters(name):
    model, x = make(MODELS[name])
    vector = ParameterVector.of(model)
    looped = vector.names if "layer" in vector.names[0] else ()
    rowwise = RowwiseNoise(model, vector, "gaussian", looped)
    noise = rowwise.draw(NoiseKeys.of(0, 0, torch.arange(ROWS), torch.zeros(ROWS).long(), 0))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with rowwise.applied(noise, 0.1):
        outputs = model(x)
    for row in range(ROWS):
        with displaced(vector, 0.1 * noise[row]):
            torch.testing.assert_close(outputs[row], model(x)[row])
    assert model.state_dict().keys() == before.keys()
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert not {"scale", "token", "factor"} & vars(model).keys()


@torch.no_grad()
@pytest.mark.parametrize("name", [*MODELS, "mixing"])
def test_the_check_finds_the_rule_or_says_what_shares_noise(name):
    model, x = make({**MODELS, "mixing": Mixing}[name])
    objective = CallableObjective(lambda outputs, inputs: outputs.flatten(1).sin().sum(1))
    perturbation, notes = choose_perturbation(
        model, objective, lambda inputs: (None, model(inputs["x"])), {"x": x}
    )
    shared = any(isinstance(part, SharedNoise) for part in perturbation.parts)
    assert shared == (name == "mixing")
    looped = name.startswith(("gru", "lstm"))
    assert len(notes) == int(shared or looped)
    if notes:
        assert ("noise that is shared" if shared else "run once for each row") in notes[0]
