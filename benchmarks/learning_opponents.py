"""Opponents of benchmarks/learning.py: plain loops over the same model, each with the head solved
from the features of the passes that it makes anyway.

None of this uses the library. All queries of a step run in one forward, whose LoRA B matrices
differ from one block of rows to the next. Every method begins with clean rows for its head,
and they are charged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from learning_head import SolvedHead
from learning_tasks import Task, adapter_of, head_of
from torch import Tensor, nn

HEAD_ROWS = 512  # clean rows before the first step
RANK, RESAMPLE_EVERY = 4, 100  # ZO-Muon: its 64 of 768 rows is our 4 of 48

Look = Callable[[int, float, nn.Module], None]


class Runner:
    """Runs a model with its LoRA B matrices taken from vectors.

    Args:
        task: what is trained.
        seed: of the model and of all that is random.

    Attributes:
        start: (P,) the B matrices that the model came with.
        head: solved from the buffer.
        rows: charged so far.
    """

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.model = task, task.model(seed).eval()
        self.model.requires_grad_(False)
        self.layers = adapter_of(self.model)
        self.start = torch.cat([layer.weight.flatten() for layer in self.layers])
        self.shapes = [layer.weight.shape for layer in self.layers]
        self.generator = torch.Generator().manual_seed(seed)
        width = head_of(self.model).in_features
        self.head, self.rows = SolvedHead(task.classes, width), 0
        self.buffer = torch.zeros(len(task.train["labels"]), width)
        self.known = torch.zeros(len(self.buffer), dtype=torch.bool)

    def parts(self, vectors: Tensor) -> list[Tensor]:
        """Cut vectors (K, P) into the B matrices (K, out, r) of the layers."""
        pieces = vectors.split([shape.numel() for shape in self.shapes], -1)
        return [piece.view(-1, *shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def features(self, vectors: Tensor, index: Tensor) -> Tensor:
        """Return the head's inputs (K, B, H) of training samples (B,) under vectors (K, P)."""
        self.rows += len(vectors) * len(index)
        most = max(1, self.task.forward_rows // len(index))
        return torch.cat([self._forward(some, index) for some in vectors.split(most)])

    def _forward(self, vectors: Tensor, index: Tensor) -> Tensor:
        found: list[Tensor] = []
        hook = head_of(self.model).register_forward_pre_hook(
            lambda module, args: found.append(args[0])
        )
        for layer, weights in zip(self.layers, self.parts(vectors), strict=True):
            layer.forward = lambda x, w=weights: _grouped(x, w)  # type: ignore[method-assign]
        inputs = {
            name: value[index].repeat(len(vectors), *[1] * (value.dim() - 1))
            for name, value in self.task.train.items()
            if name != "labels"
        }
        try:
            self.model(**inputs)
        finally:
            hook.remove()
            for layer in self.layers:
                del layer.forward
        return found[0].view(len(vectors), len(index), -1)

    def batches(self) -> Iterator[Tensor]:
        """Yield the numbers (B,) of shuffled training samples, epoch after epoch."""
        while True:
            order = torch.randperm(len(self.buffer), generator=self.generator)
            for index in order.split(self.task.batch):
                if len(index) == self.task.batch:
                    yield index

    def losses(self, found: Tensor, index: Tensor) -> Tensor:
        """Return the losses (K, B) of features (K, B, H)."""
        return self.head.losses(found, self.task.train["labels"][index])

    def keep(self, found: Tensor, index: Tensor) -> None:
        """Put features (B, H) of samples (B,) into the buffer, and solve the head anew."""
        self.buffer[index], self.known[index] = found.detach(), True
        self.head.solve(self.buffer[self.known], self.task.train["labels"][self.known], hessians=1)

    def install(self, vector: Tensor) -> None:
        """Write a vector (P,) into the model."""
        for layer, weight in zip(self.layers, self.parts(vector[None]), strict=True):
            layer.weight.data.copy_(weight[0])


def _grouped(x: Tensor, weights: Tensor) -> Tensor:
    """Apply matrices (K, out, r) to K equal blocks of rows (K B, T, r); returns (K B, T, out)."""
    blocks = x.reshape(len(weights), -1, x.shape[-1])
    return (blocks @ weights.mT).view(*x.shape[:-1], -1)


def _rademacher(runner: Runner, number: int) -> Tensor:
    shape = number, len(runner.start)
    return torch.randint(0, 2, shape, generator=runner.generator).float() * 2 - 1


def pairs(runner: Runner, theta: Tensor, index: Tensor, queries: int, step: int) -> Tensor:
    """MeZO: central differences along Gaussian noise that the batch shares."""
    del step
    z = torch.randn(queries // 2, len(theta), generator=runner.generator)
    scale = runner.task.scale
    found = runner.features(torch.cat([theta + scale * z, theta - scale * z]), index)
    plus, minus = runner.losses(found, index).mean(1).chunk(2)
    runner.keep(found.mean(0), index)
    return ((plus - minus) / (2 * scale)).float() @ z / len(z)


def _differences(runner: Runner, theta: Tensor, index: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return batch losses (K,) along noise (K, P) less the clean one, and all K + 1."""
    vectors = torch.cat([theta[None], theta + runner.task.scale * z])
    found = runner.features(vectors, index)
    losses = runner.losses(found, index).mean(1)
    runner.keep(found[0], index)
    return (losses[1:] - losses[0]).float(), losses


def one_sided(runner: Runner, theta: Tensor, index: Tensor, queries: int, step: int) -> Tensor:
    """Forward differences along signs that the batch shares, from one clean row per sample."""
    del step
    z = _rademacher(runner, queries - 1)
    differences, _ = _differences(runner, theta, index, z)
    return differences @ z / (runner.task.scale * len(z))


def fzoo(runner: Runner, theta: Tensor, index: Tensor, queries: int, step: int) -> Tensor:
    """FZOO (arXiv 2506.09034): one-sided along signs, divided by the standard deviation of the
    perturbed losses in place of epsilon.
    """
    del step
    z = _rademacher(runner, queries - 1)
    differences, losses = _differences(runner, theta, index, z)
    return differences @ z / (len(z) * losses[1:].std().float().clamp(min=1e-12))


def zo_muon(runner: Runner, theta: Tensor, index: Tensor, queries: int, step: int) -> Tensor:
    """ZO-Muon (arXiv 2602.17155): one-sided around a centre, in random subspaces P (out × rank)
    with orthonormal columns that are drawn anew every 100 steps; the estimate in the subspace is
    orthogonalised (Newton-Schulz), lifted back, and stepped along with a constant rate.
    """
    seed = runner.generator.initial_seed() * 10**6 + step // RESAMPLE_EVERY
    own = torch.Generator().manual_seed(seed)
    bases = [
        torch.linalg.qr(torch.randn(shape[0], RANK, generator=own))[0] for shape in runner.shapes
    ]
    inner = [
        torch.randn(queries - 1, RANK, shape[1], generator=runner.generator)
        for shape in runner.shapes
    ]
    z = torch.cat([(p @ psi).flatten(1) for p, psi in zip(bases, inner, strict=True)], 1)
    differences, _ = _differences(runner, theta, index, z)
    weights = differences / (runner.task.scale * len(z))
    return torch.cat(
        [
            (p @ orthogonalised(torch.einsum("k,krn->rn", weights, psi))).flatten()
            for p, psi in zip(bases, inner, strict=True)
        ]
    )


def orthogonalised(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix near 1, by Muon's five Newton-Schulz steps."""
    wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-12)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def backprop(runner: Runner, theta: Tensor, index: Tensor, queries: int, step: int) -> Tensor:
    """The exact gradient of the batch."""
    del queries, step
    with torch.enable_grad():
        own = theta.detach().requires_grad_()
        found = runner.features(own[None], index)
        (gradient,) = torch.autograd.grad(runner.losses(found, index).mean(), own)
    runner.keep(found[0], index)
    return gradient


@dataclass(frozen=True)
class Opponent:
    """An estimate of the gradient, and what steps along it.

    Attributes:
        estimate: (runner, theta, samples, rows per sample, step) → (P,).
        adam: or plain SGD.
        decay: the rate falls linearly to zero.
        queries: rows per sample to try.
    """

    estimate: Callable[[Runner, Tensor, Tensor, int, int], Tensor]
    adam: bool
    decay: bool = False
    queries: tuple[int, ...] = (16,)


OPPONENTS = {
    "MeZO + head, SGD": Opponent(pairs, adam=False, decay=True, queries=(2, 16)),
    "MeZO + head, Adam": Opponent(pairs, adam=True, queries=(2, 16)),
    "shared one-sided + head": Opponent(one_sided, adam=True),
    "FZOO + head": Opponent(fzoo, adam=False, queries=(9,)),
    "ZO-Muon + head": Opponent(zo_muon, adam=False),
    "backprop": Opponent(backprop, adam=True, queries=(1,)),
}


@torch.no_grad()
def train_opponent(
    name: str, task: Task, rate: float, queries: int, seed: int, budget: int, look: Look
) -> None:
    """Train to a budget of rows.

    Args:
        name: one of `OPPONENTS`.
        task: what is trained.
        rate: learning rate.
        queries: rows per sample.
        seed: of the model, batches and noise.
        budget: rows.
        look: called after each step with rows, seconds of the processor, and the model.
    """
    opponent, runner, start = OPPONENTS[name], Runner(task, seed), time.process_time()
    theta = nn.Parameter(runner.start.clone(), requires_grad=False)
    kind = torch.optim.Adam if opponent.adam else torch.optim.SGD
    optimizer = kind([theta], lr=rate)
    for step, index in enumerate(runner.batches()):
        if runner.rows < HEAD_ROWS:
            runner.keep(runner.features(theta[None], index)[0], index)
            continue
        if opponent.decay:
            optimizer.param_groups[0]["lr"] = rate * max(0.0, 1 - runner.rows / budget)
        theta.grad = opponent.estimate(runner, theta, index, queries, step)
        if not math.isfinite(float(theta.grad.norm())):
            theta.grad.zero_()
        optimizer.step()
        seconds = time.process_time() - start
        runner.install(theta)
        look(runner.rows, seconds, runner.model)
        start = time.process_time() - seconds
        if runner.rows >= budget:
            return
