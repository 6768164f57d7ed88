"""Epsilon follows the rounding of the loss, which no dtype of a parameter tells where a quantised
base computes in fewer bits.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_flops import BatchPosition, Method, estimate_gradient
from hf_flops.allocators import Uniform
from hf_flops.autotune.epsilon import look
from hf_flops.autotune.tuning import Tuning
from hf_flops.base.rounding_error import precision_of
from hf_flops.estimators import ESTIMATORS
from hf_flops.objectives import TappedLoss
from hf_flops.perturbations import ParameterVector, perturb
from tests.helpers.runs import adapted
from tests.helpers.tiny import model_forward, tiny_batch, tiny_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


class Repacked(nn.Linear):
    """A layer in float32 whose product is in bfloat16 in evaluation mode, as that of bitsandbytes'
    4-bit layers on processors that have such a product.
    """

    def forward(self, x):
        if self.training or torch.is_grad_enabled():
            return super().forward(x)
        return F.linear(x.bfloat16(), self.weight.bfloat16()).to(x.dtype)


class Coarse(nn.Linear):
    """A layer with errors, as quantised activations have, that every digit of its input changes."""

    def forward(self, x):
        return super().forward(x + 0.3 * (1e5 * x).sin())


def base(kind=nn.Linear):
    model = tiny_model("llama", **SIZES)
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear and name != "lm_head":
            layer.__class__ = kind
    return adapted("llama", model).eval()


def method(model, estimator, scale=1e-3):
    perturbation = perturb(model, rowwise=ParameterVector.of(model).names)
    return Method(TappedLoss(), perturbation, ESTIMATORS[estimator](), Uniform(), 32, scale, 64)


def gradient(model, estimator, scale):
    model.zero_grad()
    how = method(model, estimator, scale)
    estimate_gradient(model_forward(model), tiny_batch("llama"), how, BatchPosition(seed=0))
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("estimator", ["one_sided", "antithetic"])
def test_a_scale_above_the_rounding_is_found_and_keeps_the_gradient(estimator):
    rounded, exact = base(Repacked), base()
    assert precision_of(rounded) == precision_of(exact)  # parameters tell nothing
    scales = []
    for model in (rounded, exact):
        with torch.no_grad():
            forward, batch = model_forward(model), tiny_batch("llama")
            scales.append(look(forward, batch, method(model, estimator))[0])
    assert scales[1] == 1e-3
    assert scales[0] > 1e-3
    wanted = gradient(exact, estimator, 1e-3)
    lost = [
        1 - torch.cosine_similarity(gradient(rounded, estimator, scale), wanted, dim=0)
        for scale in (scales[0], 1e-3)
    ]
    assert lost[0] < 0.1
    assert lost[0] < lost[1] / 2


@pytest.mark.parametrize("kind", [nn.Linear, Coarse])
def test_rounding_that_no_scale_is_above_is_told(kind, caplog):
    model = base(kind)
    tuning = Tuning(rows=64, look=True, trim=False)
    with torch.no_grad():
        tuning.complete(method(model, "one_sided"), model_forward(model), tiny_batch("llama"))
    assert ("rounds so coarsely" in caplog.text) == (kind is Coarse)
    assert tuning.looked is not None
    assert (tuning.looked > 1e-3) == (kind is Coarse)
