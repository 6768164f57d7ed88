"""Beyond one machine, by measured constants and simulation: what a step costs, that lost rows do no harm, time to a target.

    python benchmarks/scaling.py measure     # seconds per row, and per number of noise that is drawn again
    python benchmarks/scaling.py simulate    # 8 to 4,096 workers that only exchange a scalar per query; docs/scaling.png

Workers are simulated: their rows are real (the noise of `hf_flops`, summed by `regenerate`), their times and losses are drawn.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.records import Record, quiet
from hf_flops.perturbations import NoiseKeys, ParameterVector
from hf_flops.regenerate import regenerate
from hf_flops.rows import Rows, expand
from hf_flops.trajectory.rules import Unwatched

WORKERS = (8, 32, 128, 512, 2048, 4096)
MESSAGE = 8  # bytes of a query: its coefficient, its sample and which of the sample's queries it is
LATENCY, BANDWIDTH = 0.05, 1.25e6  # seconds and bytes per second of one worker's link: 50 ms, 10 Mbit/s
SLOW, SLOWER, LOST = 0.02, 10.0, 0.02  # share of workers that take ten times as long in a step; of messages that are lost
QUORUM, TIMEOUT = 0.9, 3.0  # share of workers whose answers are waited for; otherwise a lost answer is asked for again


def noise_of(d: int, distribution: str = "rademacher") -> Unwatched:
    """Return the row-wise noise of d parameters, in matrices of 384 x 8 (LoRA's B) where there are enough."""
    shapes = [(384, 8)] * (d // 3072) if d >= 3072 else [(d,)]
    return Unwatched(ParameterVector([(str(i), nn.Parameter(torch.zeros(s))) for i, s in enumerate(shapes)]), distribution)


def measure() -> dict[str, Any]:
    """Measure processor seconds per query row of MiniLM with LoRA, and per number of noise that is drawn and summed again."""
    from benchmarks.tasks import reviews
    from hf_flops.rows import take

    torch.set_num_threads(1)
    task = reviews(0)
    batch, _ = next(task.batches(0, 4))
    rows = take(batch, torch.arange(64) % 4)
    times, per_number = [], {}
    with torch.no_grad():
        for _ in range(5):
            start = time.process_time()
            task.model(**rows)
            times.append((time.process_time() - start) / 64)
    for d, kind in ((12_288, "rademacher"), (73_728, "rademacher"), (294_912, "rademacher"), (73_728, "rank_one")):
        noise, found = noise_of(d, kind), []
        queries = torch.arange(64)
        for step in range(5):
            start = time.process_time()
            regenerate(noise, 0, step, queries, queries, torch.ones(64), queries, 64)
            found.append((time.process_time() - start) / 64 / d)
        per_number[f"{kind} {d}"] = float(np.median(found))
    tokens = int(batch["input_ids"].shape[1])
    return {"row_seconds": float(np.median(times)), "tokens": tokens, "number_seconds": per_number, "parameters": 73_728}


@dataclass(frozen=True)
class Costs:
    """Constants of a step: seconds of a row, seconds of a number of noise, d."""

    row: float
    number: float
    d: int

    def again(self, queries: int) -> float:
        """Seconds in which a worker draws and sums the noise of all queries again."""
        return queries * self.d * self.number

    def exchange(self, queries: int, workers: int, *, scalars: bool) -> float:
        """Seconds of the exchange over the slowest link: all scalars come in, or a gradient goes round (ring all-reduce)."""
        sent = MESSAGE * queries if scalars else 2 * 4 * self.d * (workers - 1) / workers
        rounds = math.log2(workers) if scalars else 2 * (workers - 1)
        return LATENCY * min(rounds, 2 * math.log2(workers)) + sent / BANDWIDTH


class Problem:
    """Logistic regression whose gradients are known exactly: 1,024 samples, 128 parameters, batches of 64."""

    size, d, batch = 1024, 128, 64

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(0)
        self.x = torch.randn(self.size, self.d, generator=rng) * torch.linspace(1.5, 0.75, self.d)
        wanted = self.x @ torch.randn(self.d, generator=rng) / self.d**0.5
        self.y = (wanted + torch.randn(self.size, generator=rng) * 0.5 > 0).float()
        self.smoothness = 0.25 * float(torch.linalg.matrix_norm(self.x, 2) ** 2) / self.size
        best = torch.zeros(self.d)
        for _ in range(400):
            best -= (self.errors(best, slice(None)) @ self.x) / self.size / self.smoothness
        start, end = self.loss(torch.zeros(self.d)), self.loss(best)
        self.target = end + 0.3 * (start - end)

    def errors(self, theta: Tensor, index: Any) -> Tensor:
        """Return residuals (B,): a sample's gradient is its residual times its features."""
        return torch.sigmoid(self.x[index] @ theta) - self.y[index]

    def loss(self, theta: Tensor) -> float:
        """Return the mean loss of all samples."""
        return float(nn.functional.binary_cross_entropy_with_logits(self.x @ theta, self.y))


def estimate(gradients: Tensor, rows: Rows, kept: Tensor, noise: Unwatched, step: int, *, spread: bool) -> Tensor:
    """Return the estimate (d,) that everyone makes of the scalars that arrived.

    Args:
        gradients: (B, d) of the samples; a delta is its inner product with the row's noise.
        rows: all query rows.
        kept: (R,) which of their scalars arrived.
        noise: of the parameters.
        step: the optimizer step.
        spread: whether the weight of lost rows is spread over what is left of their sample, and that of lost samples over
            the others.
    """
    rows, samples = rows[kept], len(gradients)
    if not len(rows):
        return torch.zeros(gradients.shape[1])
    weight = rows.weight
    if spread:
        left = torch.zeros(samples).index_add_(0, rows.owner, weight)
        weight = weight / left[rows.owner] / int((left > 0).sum())
    deltas = torch.empty(len(rows))
    for part in torch.arange(len(rows)).split(4096):
        keys = NoiseKeys.of(0, step, rows.owner[part], rows.query[part], 0)
        deltas[part] = (noise.draw(keys).tensor(0) * gradients[rows.owner[part]]).sum(1)
    return regenerate(noise, 0, step, rows.owner, rows.query, deltas * weight, rows.group, 4096)


def bias(problem: Problem, workers: int, repeats: int) -> dict[str, list[float]]:
    """Return mean and 95 % interval of `<estimate, g> / |g|^2`, 1 where unbiased, while a tenth of the workers is lost."""
    noise, rng = noise_of(problem.d), np.random.default_rng(workers)
    index = torch.arange(problem.batch)
    gradients = problem.errors(torch.zeros(problem.d), index)[:, None] * problem.x[index]
    gradients *= torch.linspace(0.25, 1.75, problem.batch)[:, None]  # uneven samples, in order: those of a block are alike
    mean = gradients.mean(0)
    rows = expand(torch.full((problem.batch,), 8 * workers // problem.batch), problem.batch)
    place, found = torch.arange(len(rows)), {"spread": [], "not spread": [], "blocks": []}
    interleaved = (place * 2654435761 % 2**32).argsort().argsort() % workers  # no sample lies with one worker
    blocks = rows.owner * workers // problem.batch  # a sample's rows all lie with few workers
    for repeat in range(repeats):
        slow = torch.from_numpy(rng.random(workers) < 0.1)
        # In blocks the larger samples are the slower ones, as longer texts are.
        late = torch.from_numpy(rng.random(workers)) < 0.2 * torch.arange(workers) / workers
        for name, lost in (("spread", slow[interleaved]), ("not spread", slow[interleaved]), ("blocks", late[blocks])):
            got = estimate(gradients, rows, ~lost, noise, repeat, spread=name != "not spread")
            found[name].append(float(got @ mean / (mean @ mean)))
    return {k: [float(np.mean(v)), 1.96 * float(np.std(v, ddof=1)) / len(v) ** 0.5] for k, v in found.items()}


def wait(rng: np.random.Generator, workers: int, seconds: float, *, quorum: bool) -> tuple[float, Tensor]:
    """Return how long a step waits for answers, and from which workers (W,) they came."""
    times = seconds * rng.lognormal(0.0, 0.2, workers) * np.where(rng.random(workers) < SLOW, SLOWER, 1.0)
    lost = rng.random(workers) < LOST
    if not quorum:  # a lost answer is asked for again, after a while
        return float(np.max(times + lost * TIMEOUT)), torch.ones(workers, dtype=torch.bool)
    arrivals = np.where(lost, np.inf, times)
    enough = float(np.sort(arrivals)[max(0, math.ceil(QUORUM * workers) - 1)])
    limit = enough if math.isfinite(enough) else float(np.max(times))
    return limit, torch.from_numpy(arrivals <= limit)


def race(problem: Problem, workers: int, costs: Costs, seed: int, *, quorum: bool, most: int = 4000) -> dict[str, float]:
    """Train to the target with 8 rows per worker and step; returns steps and seconds of what they are made of."""
    noise, rng = noise_of(problem.d), np.random.default_rng([seed, workers])
    theta, spent = torch.zeros(problem.d), {"forward and waiting": 0.0, "exchange": 0.0, "noise again": 0.0}
    queries = 8 * workers
    rows = expand(torch.full((problem.batch,), queries // problem.batch), problem.batch)
    owner = (torch.arange(queries) * 2654435761 % 2**32).argsort().argsort() % workers
    for step in range(most):
        index = torch.from_numpy(rng.choice(problem.size, problem.batch, replace=False))
        gradients = problem.errors(theta, index)[:, None] * problem.x[index]
        seconds, there = wait(rng, workers, 8 * costs.row, quorum=quorum)
        got = estimate(gradients, rows, there[owner], noise, step + 10_000 * seed, spread=True)
        # The step that improves the loss most, by the exact gradient and variance: as large as the noise allows.
        exact = (problem.errors(theta, slice(None)) @ problem.x) / problem.size
        signal, square = float(exact @ exact), float(gradients.square().sum()) / problem.batch**2
        variance = square * (1 + (problem.d - 1) * problem.batch / (float(there.float().mean()) * queries))
        theta = theta - got * signal / (signal + variance) / problem.smoothness
        spent["forward and waiting"] += seconds
        spent["exchange"] += costs.exchange(queries, workers, scalars=True)
        spent["noise again"] += costs.again(queries)
        if step % 5 == 4 and problem.loss(theta) <= problem.target:
            break
    return {"steps": step + 1, **spent, "seconds": sum(spent.values())}


def simulate(record: Record, repeats: int, seeds: int) -> None:
    """Simulate, print, keep and draw."""
    constants = record.entries["constants"]
    d = constants["parameters"]
    costs = Costs(constants["row_seconds"], constants["number_seconds"][f"rademacher {d}"], d)
    cheaper = constants["number_seconds"][f"rank_one {d}"] / costs.number  # drawing and summing rank-one noise
    problem, found = Problem(), {}
    for workers in WORKERS:
        own: dict[str, Any] = {"bias": bias(problem, workers, max(64, repeats * 8 // workers))}
        for name, quorum in (("quorum", True), ("everyone", False)):
            runs = [race(problem, workers, costs, seed, quorum=quorum) for seed in range(seeds)]
            own[name] = {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
            own[name]["seconds with rank-one noise"] = own[name]["seconds"] - own[name]["noise again"] * (1 - cheaper)
            own[name]["range"] = [min(run["seconds"] for run in runs), max(run["seconds"] for run in runs)]
        queries = 8 * workers
        own["step"] = {
            "forward": 8 * costs.row,
            "again": costs.again(queries),
            "rank one again": costs.again(queries) * cheaper,
            "scalars": costs.exchange(queries, workers, scalars=True),
            "gradient": costs.exchange(queries, workers, scalars=False),
            "received_bytes": {"scalars": MESSAGE * queries, "gradient": 8 * d},
        }
        found[str(workers)] = own
        bars = ", ".join(f"{name} {mean:.3f} ± {half:.3f}" for name, (mean, half) in own["bias"].items())
        print(f"{workers:>5} workers: {bars}; to the target: {own['quorum']['seconds']:,.0f} s with a quorum in "
              f"{own['quorum']['steps']:.0f} steps, {own['everyone']['seconds']:,.0f} s with everyone")  # fmt: skip
    record.keep("simulation", {"workers": found, "seeds": seeds, "target": problem.target})


def draw(record: Record) -> None:
    """Draw docs/scaling.png from the record."""
    from hf_flops.plots import pyplot

    plt, found = pyplot(), record.entries["simulation"]["workers"]
    workers = [int(key) for key in found]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    names = {"spread": "spread over the sample's rows", "not spread": "not spread", "blocks": "whole samples are lost"}
    for shift, (name, label) in zip((0.94, 1.0, 1.06), names.items(), strict=True):
        mean, half = np.array([found[str(w)]["bias"][name] for w in workers]).T
        left.errorbar(np.array(workers) * shift, mean, half, fmt="o", markersize=4, capsize=3, label=label)
    left.axhline(1, color="#52525b", linewidth=1, linestyle="--")
    left.set(title="A tenth of the workers is lost", ylabel="estimate along the gradient (1: unbiased), 95 % interval")
    for key, label in (("forward", "forward, 8 rows"), ("again", "noise again, signs"), ("rank one again", "noise again, rank one"),
                       ("scalars", "exchange of scalars"),
                       ("gradient", "exchange of a gradient")):  # fmt: skip
        middle.plot(workers, [found[str(w)]["step"][key] for w in workers], "o-", markersize=4, label=label)
    middle.set(title="What a step is made of", ylabel="seconds", yscale="log")
    for name, label in (("quorum", "first 90 % of the answers"), ("everyone", "waiting for everyone")):
        right.plot(workers, [found[str(w)][name]["seconds"] for w in workers], "o-", markersize=4, label=label)
    cheap = [found[str(w)]["quorum"]["seconds with rank-one noise"] for w in workers]
    right.plot(workers, cheap, "o-", markersize=4, label="first 90 %, rank-one noise")
    first = found[str(workers[0])]["quorum"]["seconds"]
    right.plot(workers, [first * workers[0] / w for w in workers], ":", color="#a1a1aa", label="in proportion")
    right.set(title="Time to the target", ylabel="seconds", yscale="log")
    for axes in (left, middle, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(workers, [f"{w:,}" for w in workers])
        axes.set_xlabel("workers")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs" / "scaling.png", dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, simulate or draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("measure", "simulate", "draw"))
    parser.add_argument("--repeats", type=int, default=2000, help="estimates for each interval at 8 workers, fewer at more")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    quiet()
    record = Record("scaling")
    if given.what == "measure":
        record.keep("constants", measure())
        print(record.entries["constants"])
    if given.what == "simulate":
        simulate(record, given.repeats, given.seeds)
    if given.what != "measure":
        draw(record)


if __name__ == "__main__":
    main()
