"""How well a 16-bit base follows the gradient: cosine of its mean estimate with that of the same
model in float32.

Both estimate from the same noise, the 16-bit base with `perturbation_scale="auto"`, float32 with
1e-3, with one-sided and with antithetic differences: at the epsilons that 16 bits need, the
curvature of the former is no longer small. `cosine` is that of two estimates, `mean_cosine` that of
their means: what rounding adds at random falls with the number of draws, what it adds always stays.
Over k draws of noise, float32's mean is the gradient g by backprop, the other's g + b, with b the
mean of the differences between the two. |b|^2 is the mean product of different draws: without bias,
from few draws.

    python benchmarks/precision.py                       # MiniLM
    python benchmarks/precision.py smollm2-small --estimators antithetic

The error of a mean grows with the number of parameters, 460,800 for SmolLM2's LoRA: `smollm2-small`
has 7,680 (rank 1, the last ten layers, B alone).

Products are summed in float32 and rounded once, as processors that have bfloat16 do; `--native`
leaves them to torch, which is slow on those that have none.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, set_seed

from cases import CASES, Case, lora, smollm2, texts  # isort: skip
from records import Record, quiet  # isort: skip

from hf_flops import BatchPosition, Method, estimate_gradient
from hf_flops.allocators import Uniform
from hf_flops.autotune.epsilon import calibrate
from hf_flops.estimators import ESTIMATORS
from hf_flops.objectives import TappedLoss
from hf_flops.perturbations import ParameterVector, perturb

# samples, rows per sample
SETTINGS = {"minilm": (16, 13), "smollm2": (2, 16), "smollm2-small": (2, 16)}


def smollm2_small() -> Case:
    """SmolLM2-135M with an adapter so small that few draws tell the mean of its estimates."""
    model = AutoModelForCausalLM.from_pretrained(smollm2())
    model = lora(model, list(range(20, 30)), ["q_proj", "v_proj"], rank=1, task_type="CAUSAL_LM")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_B" in name
    return Case(
        "SmolLM2, LoRA-B of rank 1 in the last third",
        model,
        texts(smollm2(), 8, 32, answers=True),
        64,
    )


PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")}


class Float32Products(TorchDispatchMode):
    """Matrix products of bfloat16 tensors summed in float32 and rounded once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **(kwargs or {}))
        wide = [own.float() if isinstance(own, Tensor) else own for own in args]
        return func(*wide, **(kwargs or {})).bfloat16()


def halved(case: Case) -> Case:
    """Return a copy with its base in bfloat16 and its adapter in float32."""
    model = copy.deepcopy(case.model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if name not in trainable:
            parameter.data = parameter.data.bfloat16()
    return replace(case, model=model)


def estimate(case: Case, inputs: dict[str, Tensor], method: Method, seed: int) -> Tensor:
    """Return the estimate (d,)."""
    case.model.zero_grad()
    estimate_gradient(case.forward, inputs, method, BatchPosition(seed=seed))
    return gradient(case)


def gradient(case: Case) -> Tensor:
    """Return what the parameters' `grad` holds (d,)."""
    return torch.cat([p.grad.flatten().double() for p in ParameterVector.of(case.model).parameters])


def mean_cosine(g: Tensor, differences: Tensor) -> tuple[float, float]:
    """Return the cosine of g (d,) and of g plus the mean of differences (k, d), and its jackknife
    standard error.
    """
    products, along, k = differences @ differences.T, differences @ g, len(differences)

    def cosine(kept: Tensor) -> Tensor:
        own, n = products[kept][:, kept], len(kept)
        bias = (own.sum() - own.trace()) / (n * (n - 1))
        return (g @ g + along[kept].mean()) / (
            g.norm() * (g @ g + 2 * along[kept].mean() + bias).sqrt()
        )

    everyone = torch.arange(k)
    without = torch.stack([cosine(everyone[everyone != left]) for left in range(k)])
    return float(cosine(everyone)), float(((k - 1) * without.var(correction=0)).sqrt())


def measure(name: str, estimator: str, draws: int, native: bool) -> dict[str, Any]:
    """Compare one case's estimates."""
    samples, queries = SETTINGS[name]
    set_seed(0)  # the adapter's and the head's first values
    case = {**CASES, "smollm2-small": smollm2_small}[name]()
    half = halved(case)
    inputs = {key: value[:samples] for key, value in case.inputs.items()}
    methods = []
    for own in (case, half):
        names = ParameterVector.of(own.model).names
        parts = (
            TappedLoss(),
            perturb(own.model, rowwise=names),
            ESTIMATORS[estimator](),
            Uniform(),
        )
        methods.append(Method(*parts, queries, 1e-3, 8))
    rounding = contextlib.nullcontext if native else Float32Products
    with torch.no_grad(), rounding():
        chosen = calibrate(half.forward, inputs, methods[1])
    assert chosen.scale is not None
    methods[1] = replace(methods[1], scale=chosen.scale)
    case.model.zero_grad()
    case.model(**inputs).loss.backward()
    g, cosines, differences = gradient(case), [], []
    for seed in range(7, 7 + draws):
        wide = estimate(case, inputs, methods[0], seed)
        with rounding():
            narrow = estimate(half, inputs, methods[1], seed)
        cosines.append(float(torch.cosine_similarity(wide, narrow, dim=0)))
        differences.append(narrow - wide)
    found = {
        "case": case.name,
        "estimator": estimator,
        "rows": samples * queries,
        "epsilon": chosen.scale,
    }
    found |= {
        "signal_to_noise": chosen.signal_to_noise,
        "draws": draws,
        "cosines": cosines,
        "native": native,
    }
    found["cosine"] = sum(cosines) / draws
    if draws > 2:
        found["mean_cosine"], found["standard_error"] = mean_cosine(g, torch.stack(differences))
    return found


def main() -> None:
    """Measure cases; write results/precision.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cases", nargs="*", default=["minilm"])
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS))
    parser.add_argument(
        "--draws", type=int, default=16, help="estimates of each, with noise of their own"
    )
    parser.add_argument("--native", action="store_true", help="leave products in bfloat16 to torch")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(SETTINGS):
        parser.error(f"unknown cases {sorted(unknown)}: choose among {', '.join(SETTINGS)}")
    quiet()
    record = Record("precision")
    for name in options.cases:
        for estimator in options.estimators:
            found = measure(name, estimator, options.draws, options.native)
            print({key: value for key, value in found.items() if key != "cosines"}, flush=True)
            record.keep(f"{name}, {estimator}", found)


if __name__ == "__main__":
    main()
