"""Simulated workers of benchmarks/scaling.py: their rows and noise are real, their times and losses
are drawn.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hf_flops.base.rows import Rows, expand
from hf_flops.perturbations import NoiseKeys, ParameterVector
from hf_flops.perturbations.replay import regenerate
from hf_flops.trajectory.rules import Unwatched

MESSAGE = 8  # bytes of a query: its coefficient, its sample and which of the sample's queries it is
# seconds and bytes per second of one worker's link: 50 ms, 10 Mbit/s
LATENCY, BANDWIDTH = 0.05, 1.25e6
# share of workers that take ten times as long in a step; of messages that are lost
SLOW, SLOWER, LOST = 0.02, 10.0, 0.02
# share of workers whose answers are waited for; otherwise a lost answer is asked for again
QUORUM, TIMEOUT = 0.9, 3.0


def noise_of(d: int, distribution: str = "rademacher") -> Unwatched:
    """Return the row-wise noise of d parameters, in matrices of 384 x 8 (LoRA's B) where there are
    enough.
    """
    shapes = [(384, 8)] * (d // 3072) if d >= 3072 else [(d,)]
    return Unwatched(
        ParameterVector([(str(i), nn.Parameter(torch.zeros(s))) for i, s in enumerate(shapes)]),
        distribution,
    )


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
        """Seconds of the exchange over the slowest link: all scalars come in, or a gradient goes
        round (ring all-reduce).
        """
        sent = MESSAGE * queries if scalars else 2 * 4 * self.d * (workers - 1) / workers
        rounds = math.log2(workers) if scalars else 2 * (workers - 1)
        return LATENCY * min(rounds, 2 * math.log2(workers)) + sent / BANDWIDTH


class Problem:
    """Logistic regression whose gradients are known exactly: 1,024 samples, 128 parameters, batches
    of 64.
    """

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


def estimate(
    gradients: Tensor, rows: Rows, kept: Tensor, noise: Unwatched, step: int, *, spread: bool
) -> Tensor:
    """Return the estimate (d,) that everyone makes of the scalars that arrived.

    Args:
        gradients: (B, d) of the samples; a delta is its inner product with the row's noise.
        rows: all query rows.
        kept: (R,) which of their scalars arrived.
        noise: of the parameters.
        step: the optimizer step.
        spread: whether the weight of lost rows is spread over what is left of their sample, and
            that of lost samples over the others.
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
    return regenerate(
        noise, 0, step, rows.owner, rows.query, deltas * weight, rows.group, 4096
    ).float()


def bias(problem: Problem, workers: int, repeats: int) -> dict[str, list[float]]:
    """Return mean and 95 % interval of `<estimate, g> / |g|^2`, 1 where unbiased, while a tenth of
    the workers is lost.
    """
    noise, rng = noise_of(problem.d), np.random.default_rng(workers)
    index = torch.arange(problem.batch)
    gradients = problem.errors(torch.zeros(problem.d), index)[:, None] * problem.x[index]
    # uneven samples, in order: those of a block are alike
    gradients *= torch.linspace(0.25, 1.75, problem.batch)[:, None]
    mean = gradients.mean(0)
    rows = expand(torch.full((problem.batch,), 8 * workers // problem.batch), problem.batch)
    place, found = torch.arange(len(rows)), {"spread": [], "not spread": [], "blocks": []}
    # no sample lies with one worker
    interleaved = (place * 2654435761 % 2**32).argsort().argsort() % workers
    blocks = rows.owner * workers // problem.batch  # a sample's rows all lie with few workers
    for repeat in range(repeats):
        slow = torch.from_numpy(rng.random(workers) < 0.1)
        # In blocks the larger samples are the slower ones, as longer texts are.
        late = torch.from_numpy(rng.random(workers)) < 0.2 * torch.arange(workers) / workers
        for name, lost in (
            ("spread", slow[interleaved]),
            ("not spread", slow[interleaved]),
            ("blocks", late[blocks]),
        ):
            got = estimate(gradients, rows, ~lost, noise, repeat, spread=name != "not spread")
            found[name].append(float(got @ mean / (mean @ mean)))
    return {
        k: [float(np.mean(v)), 1.96 * float(np.std(v, ddof=1)) / len(v) ** 0.5]
        for k, v in found.items()
    }


def wait(
    rng: np.random.Generator, workers: int, seconds: float, *, quorum: bool
) -> tuple[float, Tensor]:
    """Return how long a step waits for answers, and from which workers (W,) they came."""
    times = (
        seconds
        * rng.lognormal(0.0, 0.2, workers)
        * np.where(rng.random(workers) < SLOW, SLOWER, 1.0)
    )
    lost = rng.random(workers) < LOST
    if not quorum:  # a lost answer is asked for again, after a while
        return float(np.max(times + lost * TIMEOUT)), torch.ones(workers, dtype=torch.bool)
    arrivals = np.where(lost, np.inf, times)
    enough = float(np.sort(arrivals)[max(0, math.ceil(QUORUM * workers) - 1)])
    limit = enough if math.isfinite(enough) else float(np.max(times))
    return limit, torch.from_numpy(arrivals <= limit)


def race(
    problem: Problem, workers: int, costs: Costs, seed: int, *, quorum: bool, most: int = 4000
) -> dict[str, float]:
    """Train to the target with 8 rows per worker and step; returns steps and seconds of what they
    are made of.
    """
    noise, rng = noise_of(problem.d), np.random.default_rng([seed, workers])
    theta, spent = (
        torch.zeros(problem.d),
        {"forward and waiting": 0.0, "exchange": 0.0, "noise again": 0.0},
    )
    queries = 8 * workers
    rows = expand(torch.full((problem.batch,), queries // problem.batch), problem.batch)
    owner = (torch.arange(queries) * 2654435761 % 2**32).argsort().argsort() % workers
    for step in range(most):
        index = torch.from_numpy(rng.choice(problem.size, problem.batch, replace=False))
        gradients = problem.errors(theta, index)[:, None] * problem.x[index]
        seconds, there = wait(rng, workers, 8 * costs.row, quorum=quorum)
        got = estimate(gradients, rows, there[owner], noise, step + 10_000 * seed, spread=True)
        # The step that improves the loss most, by the exact gradient and variance: as large as the
        # noise allows.
        exact = (problem.errors(theta, slice(None)) @ problem.x) / problem.size
        signal, square = float(exact @ exact), float(gradients.square().sum()) / problem.batch**2
        variance = square * (
            1 + (problem.d - 1) * problem.batch / (float(there.float().mean()) * queries)
        )
        theta = theta - got * signal / (signal + variance) / problem.smoothness
        spent["forward and waiting"] += seconds
        spent["exchange"] += costs.exchange(queries, workers, scalars=True)
        spent["noise again"] += costs.again(queries)
        if step % 5 == 4 and problem.loss(theta) <= problem.target:
            break
    return {"steps": step + 1, **spent, "seconds": sum(spent.values())}
