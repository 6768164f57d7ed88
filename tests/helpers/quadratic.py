"""A model whose gradient is known in closed form, and one estimate of it."""

import torch
from torch import nn

from hf_flops import BatchPosition, CallableObjective, Method, estimate_gradient
from hf_flops.allocators import Uniform
from hf_flops.estimators import OneSided
from hf_flops.perturbations import ParameterVector, perturb
from tests.helpers.tiny import generator

SAMPLES, WIDTH = 5, 3


class Fixed(Uniform):
    """An allocator that gives the counts it was told to."""

    def __init__(self, counts):
        self.fixed = torch.tensor(counts)

    def counts(self, features, budget):
        assert budget == self.fixed.sum()
        return self.fixed


class Quadratic(nn.Module):
    """Row losses `(w . x_i - y_i)^2 / 2` of very different sizes, in float64."""

    def __init__(self, shared=False):
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1).double()
        with torch.no_grad():
            for parameter in self.linear.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator(1)))

    def forward(self, features, labels):
        return 0.5 * (self.linear(features).squeeze(-1) - labels).square()


def quadratic_batch():
    scale = torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0]).double()
    features = torch.randn(SAMPLES, WIDTH, generator=generator(2)).double() * scale[:, None]
    return {"features": features, "labels": torch.arange(SAMPLES).double()}


def one_estimate(model, inputs, *, step=0, elements=None, batches=1, place=None, **options):
    """One estimate; returns the flat gradient and the result."""
    vector = ParameterVector.of(model)
    kind = options.pop("kind", "rowwise")
    defaults = {
        "objective": CallableObjective(lambda outputs, inputs: outputs),
        "perturbation": perturb(
            model, **{kind: vector.names}, distribution=options.pop("distribution", "gaussian")
        ),
        "estimator": OneSided(),
        "allocator": Uniform(),
        "queries_per_sample": 4,
        "scale": 1e-3,
        "rows_per_forward": 7,
    }
    model.zero_grad()
    forward = options.pop("forward", lambda batch: (None, model(**batch)))
    result = estimate_gradient(
        forward,
        inputs,
        Method(**{**defaults, **options}),
        place or BatchPosition(step=step),
        elements,
        batches,
    )
    return torch.cat([p.grad.flatten().double() for p in vector.parameters]), result


def repeated(inputs, times):
    """Return so many copies of a batch as one: where rows have noise of their own, one estimate is
    as good as so many.
    """
    return {name: torch.cat([value] * times) for name, value in inputs.items()}


def true_gradient(model, inputs):
    model.zero_grad()
    model(**inputs).mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])
