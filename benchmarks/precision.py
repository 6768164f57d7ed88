"""How well a 16-bit base follows the gradient: cosine of its mean estimate with that of the same model in float32.

Both estimate from the same noise, the 16-bit base with `perturbation_scale="auto"`, float32 with 1e-3, with one-sided and
with antithetic differences: at the epsilons that 16 bits need, the curvature of the former is no longer small.

    python benchmarks/precision.py                  # MiniLM
    python benchmarks/precision.py minilm smollm2   # slow where the processor has no bfloat16
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from cases import CASES, Case  # isort: skip
from records import Record, quiet  # isort: skip

from hf_flops import Method, Place, estimate_gradient
from hf_flops.allocators import Uniform
from hf_flops.calibration import calibrate
from hf_flops.estimators import ESTIMATORS
from hf_flops.objectives import TappedLoss
from hf_flops.perturbations import ParameterVector, perturb

SETTINGS = {"minilm": (16, 13), "smollm2": (2, 16)}  # samples, rows per sample


def halved(case: Case) -> Case:
    """Return a copy with its base in bfloat16 and its adapter in float32."""
    model = copy.deepcopy(case.model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if name not in trainable:
            parameter.data = parameter.data.bfloat16()
    return replace(case, model=model)


def estimate(case: Case, inputs: dict[str, Tensor], method: Method) -> Tensor:
    """Return the estimate (d,)."""
    case.model.zero_grad()
    estimate_gradient(case.forward, inputs, method, Place(seed=7))
    return torch.cat([p.grad.flatten().double() for p in ParameterVector.of(case.model).parameters])


def measure(name: str, estimator: str) -> dict[str, Any]:
    """Compare one case's estimates."""
    samples, queries = SETTINGS[name]
    set_seed(0)  # the adapter's and the head's first values
    case = CASES[name]()
    inputs = {key: value[:samples] for key, value in case.inputs.items()}
    found: dict[str, Any] = {"case": case.name, "estimator": estimator, "rows": samples * queries}
    estimates = []
    for kind, own in (("float32", case), ("bfloat16", halved(case))):
        names = ParameterVector.of(own.model).names
        parts = (TappedLoss(), perturb(own.model, rowwise=names), ESTIMATORS[estimator](), Uniform())
        method = Method(*parts, queries, 1e-3, 8)
        if kind == "bfloat16":
            with torch.no_grad():
                chosen = calibrate(own.forward, inputs, method)
            assert chosen.scale is not None
            found |= {"epsilon": chosen.scale, "signal_to_noise": chosen.signal_to_noise}
            method = replace(method, scale=chosen.scale)
        estimates.append(estimate(own, inputs, method))
    found["cosine"] = float(torch.cosine_similarity(*estimates, dim=0))
    return found


def main() -> None:
    """Measure cases; write results/precision.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", default=["minilm"])
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS))
    options = parser.parse_args()
    if unknown := set(options.cases) - set(SETTINGS):
        parser.error(f"unknown cases {sorted(unknown)}: choose among {', '.join(SETTINGS)}")
    quiet()
    record = Record("precision")
    for name in options.cases:
        for estimator in options.estimators:
            found = measure(name, estimator)
            print(found, flush=True)
            record.keep(f"{name}, {estimator}", found)


if __name__ == "__main__":
    main()
