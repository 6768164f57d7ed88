"""Whether noise is visible through the rounding of a black box."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..base.batch import Inputs, batch_size, take
from ..core.method import Method
from ..errors import ConfigurationError
from ..objectives import Forward
from .epsilon import evaluated


def require_visible(forward: Forward, inputs: Inputs, method: Method, seed: int = 0) -> int:
    """Require that an engine's rounding does not swallow the noise; return the rows used.

    Deltas of the same queries at neighbouring scales are nearly equal where they are derivatives:
    for the better of two pairs x, y up to the method's scale, `2 x . y / (|x|^2 + |y|^2)` is near
    1. Where it is not, rounding shows in deltas that grow towards smaller scales, or vanish there;
    else it is curvature. A sample's clean loss is rounded by the same at all scales, so deltas are
    taken less the mean of their sample.

    An objective that moves in steps needs noise that is far above rounding, and is not looked at.

    Args:
        forward: runs the model, in evaluation mode, without gradients.
        inputs: a batch of B samples.
        method: how gradients are estimated.
        seed: the run's seed.

    Raises:
        ConfigurationError: it does.
    """
    if method.objective.piecewise_constant:
        return 0
    method, few, queries = replace(method, objective=method.objective.surrogate), 1, 16
    if method.objective.per_row:
        few = min(4, batch_size(inputs))
        inputs, queries = take(inputs, torch.arange(few)), 4 * few
    grid = tuple(method.scale * 10**power for power in (-1.0, -0.5, 0.0))
    deltas, rows = evaluated(forward, inputs, method, seed, grid, queries)
    deltas = deltas.unflatten(1, (few, -1))
    deltas = deltas[:, deltas.isfinite().all(0).all(1)]
    if not deltas.numel():
        return rows
    vanish = float((deltas[0] == 0).double().mean()) >= 0.5
    deltas = (deltas - deltas.mean(2, keepdim=True)).flatten(1)
    squares, products = deltas.square().sum(1), (deltas[1:] * deltas[:-1]).sum(1)
    agreement = float((2 * products / (squares[1:] + squares[:-1])).max())
    if not agreement >= 0.6 and (vanish or squares[0] > 2 * squares[-1]):
        raise ConfigurationError(
            f"perturbation_scale={method.scale:g} is lost in the engine's rounding: differences of "
            f"the same queries at smaller scales agree by {agreement:.2f}, not 1. Run the engine "
            "in float32 (vLLM: --dtype float32), or pass a larger perturbation_scale, or 'auto'."
        )
    return rows
