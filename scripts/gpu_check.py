"""Checks hf_flops on an accelerator, and measures it: noise bits, the estimate against autograd, a
resumed run; then rows per second, memory, waits and where time goes.

    scripts/gpu-check                        # the GPU; eight minutes at most
    scripts/gpu-check --device cpu --small   # tiny models, to see that all of this runs

Writes a JSON and prints a table for docs/speed.md. What does not fit in the time or in the memory
is said, and left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np
import torch
from accelerator import examined, llama, offloaded, vit
from cases import Case
from records import quiet
from torch import Tensor, nn

from hf_flops import BatchPosition, FlopsTrainer, FlopsTrainingArguments, Method, estimate_gradient
from hf_flops.allocators import Uniform
from hf_flops.base.prng import seeds, words, words_on
from hf_flops.base.transfer import synchronise
from hf_flops.estimators import Antithetic
from hf_flops.objectives import CallableObjective
from hf_flops.perturbations import ParameterVector, perturb
from hf_flops.perturbations.noise import draw

SECONDS = 480.0


def bits(device: torch.device) -> dict[str, Any]:
    """Compare noise of the device with that of the CPU, and time drawing it."""
    row_seeds, count = seeds(0, np.arange(256)), 460_800 // 64
    found = words_on(device, row_seeds, count)
    equal = np.array_equal(found.cpu().numpy().view(np.uint64), words(row_seeds, count))
    shapes, coefficients = [torch.Size((64, 24)), torch.Size((7,))], torch.randn(256, 3)
    sums = [
        draw("rademacher", row_seeds, shapes, where).exact_sum(coefficients.to(where)).cpu()
        for where in (torch.device("cpu"), device)
    ]
    synchronise(device)
    host = []
    for _ in range(20):
        start = time.perf_counter()
        words_on(device, row_seeds, count)
        host.append(time.perf_counter() - start)
        synchronise(device)
    return {
        "noise bits": equal,
        "exact sums": torch.equal(*sums),
        "milliseconds of the host for 256 x 460,800 numbers": 1e3 * float(np.median(host)),
    }


def autograd(device: torch.device) -> dict[str, Any]:
    """Compare the mean of 65,536 queries with autograd, and one step with the CPU's."""
    found = {}
    for where in (torch.device("cpu"), device):
        generator = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))
        for parameter in model.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        inputs = {"x": torch.randn(16, 16, generator=generator).to(where)}
        vector = ParameterVector.of(model.to(where))
        method = Method(
            CallableObjective(lambda outputs, inputs: outputs.squeeze(1).square()),
            perturb(model, rowwise=vector.names),
            Antithetic(),
            Uniform(),
            8192,
            1e-2,
            8192,
        )
        estimate_gradient(
            lambda inputs, model=model: (None, model(inputs["x"])), inputs, method, BatchPosition()
        )
        found[where.type] = _gradient(vector)
        model.zero_grad()
        (model(inputs["x"]).square().sum() / 16).backward()
    exact, here = _gradient(vector), found["cpu"]
    cosine = float(torch.nn.functional.cosine_similarity(found[device.type], exact, dim=0))
    error = float((found[device.type] - here).norm() / here.norm())
    return {"cosine with autograd": cosine, "difference from the CPU": error}


def _gradient(vector: ParameterVector) -> Tensor:
    grads = [p.grad for p in vector.parameters if p.grad is not None]
    return torch.cat([grad.detach().flatten().cpu() for grad in grads])


def resumed(device: torch.device, folder: Path) -> dict[str, Any]:
    """Compare a run with one that is resumed half-way."""

    def run(name: str, checkpoint: str | None = None) -> Tensor:
        torch.manual_seed(0)
        case = llama("SmolLM2-135M", torch.device("cpu"), torch.float32, True)
        columns = zip(*case.inputs.values(), strict=True)
        rows = [dict(zip(case.inputs, row, strict=True)) for row in columns] * 2
        args = FlopsTrainingArguments(
            str(folder / name),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            queries_per_sample=4,
            rows_per_forward=16,
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            pictures=False,
            use_cpu=device.type == "cpu",
        )
        trainer = FlopsTrainer(case.model, args, train_dataset=rows)
        trainer.train(resume_from_checkpoint=checkpoint)
        return torch.cat([p.detach().flatten().cpu() for p in case.model.parameters()])

    whole = run("whole")
    again = run("again", str(folder / "whole" / "checkpoint-2"))
    return {"resumed run is the same": torch.equal(whole, again)}


def parts(device: torch.device, small: bool, repeats: int) -> dict[str, Callable[[], Any]]:
    """Return what is measured, in this order."""
    half, full = torch.bfloat16, torch.float32
    cases: dict[str, Callable[[], Case]] = {
        "ViT-B/16, float32": partial(vit, device, full, small),
        "ViT-B/16, bfloat16": partial(vit, device, half, small),
        "SmolLM2-135M, float32": partial(llama, "SmolLM2-135M", device, full, small),
        "SmolLM2-135M, bfloat16": partial(llama, "SmolLM2-135M", device, half, small),
        "Llama 1B, bfloat16": partial(llama, "Llama 1B", device, half, small),
    }
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 40 * 2**30:
        cases["Llama 7B, bfloat16"] = partial(llama, "Llama 7B", device, half, small)
    measured: dict[str, Callable[[], Any]] = {
        name: lambda case=case: examined(case(), device, repeats) for name, case in cases.items()
    }
    if small:
        measured = {name: measured[name] for name in ("ViT-B/16, float32", "SmolLM2-135M, float32")}
    return {**measured, "Llama 1B, offloaded": partial(offloaded, device, small)}


def card(device: torch.device) -> str:
    """Return the device's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def table(name: str, found: dict[str, Any]) -> str:
    """Return the measurements as a table for docs/speed.md."""
    lines = [f"| {name} | rows/s | ours / plain | MeZO / plain | peak MB, ours / plain | waits |"]
    lines.append("| --- |" + " --- |" * 5)
    for case, own in found.items():
        if "against_plain" not in own:
            lines.append(f"| {case} | {own.get('left out', '')} | | | | |")
            continue
        ratios, memory = own["against_plain"], own.get("megabytes")
        peak = "" if memory is None else f"{memory['ours']:.0f} / {memory['plain']:.0f}"
        mezo = f"{ratios['mezo']:.2f}" if "mezo" in ratios else ""
        speed = f"{own['rows_per_second']['ours']:.0f} | {ratios['ours']:.2f} | {mezo}"
        lines.append(f"| {case} | {speed} | {peak} | {own.get('waits') or ''} |")
    return "\n".join(lines)


def wrong(checks: dict[str, Any]) -> list[str]:
    """Return the checks that failed."""
    failed = [name for name, value in checks.items() if value is False]
    failed += ["cosine with autograd"] * (checks["cosine with autograd"] < 0.97)
    failed += ["difference from the CPU"] * (checks["difference from the CPU"] > 0.02)
    return failed


def attempt(part: Callable[[], Any]) -> dict[str, Any]:
    """Return what a part found, or why it could not run."""
    try:
        return part()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return {"left out": f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"}


def main() -> int:
    """Check, measure, write; return 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models; always on the CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("gpu-check.json"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here: --device cpu checks that all of this runs")
    quiet()
    device, start = torch.device(options.device), time.monotonic()
    small = options.small or device.type == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        checks = {**bits(device), **autograd(device), **resumed(device, Path(folder))}
    for name, value in checks.items():
        print(f"{name}: {value}", flush=True)
    found: dict[str, Any] = {}
    for name, part in parts(device, small, options.repeats).items():
        late = time.monotonic() - start > 0.8 * SECONDS
        found[name] = {"left out": "no time left"} if late else attempt(part)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    record = {"device": card(device), "torch": torch.__version__, "small": small}
    record |= {"seconds": time.monotonic() - start, "checks": checks, "cases": found}
    options.output.write_text(json.dumps(record, indent=1))
    print(table(card(device), found))
    failed = wrong(checks)
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
