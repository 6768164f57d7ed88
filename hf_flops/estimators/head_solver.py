"""A linear head that is solved instead of stepped: its inputs in past clean forwards are kept, and
its weights minimise the loss on them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base.state import State, flag
from ..base.transfer import to_host
from ..objectives import RowLosses
from .closed_form_head import ClosedFormHead
from .feature_solver import PRIOR, FeatureSolver, minimise
from .head_state import Sample, check_same_head, loaded_samples

# of the kept samples, 64 MiB, and of samples, over which every step solves; the oldest are dropped
MOST_NUMBERS, MOST_SAMPLES = 2**24, 2**16
_LEAST_PER_LOGIT = 64  # samples that must fit for each logit, or the solution would be poor


class HeadSolver(FeatureSolver):
    """Keeps what clean forwards show of a linear head's inputs and targets, and solves for the
    head's weights after each optimizer step (see `FeatureSolver`), both on the CPU: the many short
    steps of L-BFGS would each wait for a device.

    The loss is that of a generalised linear model (softmax, logistic or linear regression), so it
    is convex in the weights. A Gaussian prior around the weights at the start, whose precision is
    `PRIOR` times the mean squared norm of the inputs, keeps the solution finite where the classes
    can be separated.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from hf_flops.estimators import ClosedFormHead, HeadSolver
        >>> from hf_flops.objectives import RowLosses
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> solver = HeadSolver()
        >>> solver.bind(ClosedFormHead(layer, {"weight": "head.weight"}))
        >>> x = torch.arange(100.0)[:, None]
        >>> squares = {"targets": 3 * x, "weights": torch.full_like(x, 2.0), "mean": "identity"}
        >>> solver.add(x, RowLosses(torch.ones(100), torch.ones(100), **squares))
        >>> solver.solve()
        >>> round(layer.weight.item(), 3)
        3.0
    """

    def __init__(self, agree: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        super().__init__(agree)
        self.head: ClosedFormHead | None = None
        self._mean = "softmax"
        # the sample's id, or a negative number → sample, oldest first
        self._samples: OrderedDict[int, Sample] = OrderedDict()
        self._numbers = self._unnamed = 0
        self._prior: Tensor | None = None
        self._solution: Tensor | None = None  # the weights of the last solution

    @staticmethod
    def solves(head: ClosedFormHead, losses: RowLosses) -> bool:
        """Return whether a head can be solved for: the loss is known to be of a generalised linear
        model, and enough samples can be kept.
        """
        if losses.targets is None:
            return False
        layer = head.module
        elements = losses.targets.shape[1] // layer.out_features
        numbers = elements * (layer.in_features + 2 * layer.out_features)
        return _LEAST_PER_LOGIT * layer.out_features * numbers <= MOST_NUMBERS

    def bind(self, head: ClosedFormHead) -> None:
        """Solve this head from now on; another head than before starts without samples.

        Raises:
            ConfigurationError: the samples of a checkpoint are those of another head.
        """
        if self.head is not None and self.head.names != head.names:
            self._samples, self._numbers = OrderedDict(), 0
            self._prior = self._solution = None
        self.head = head
        if self._prior is None:
            self._prior = head.weights()
        elif self._solution is None:
            features = head.module.in_features
            check_same_head(self._samples.values(), self._prior, head.weights(), features)
        if self._solution is None:
            self._solution = head.weights()

    def features(self) -> Tensor | None:
        """Return (N, H), the inputs of all kept loss elements; None before the first."""
        if not self._samples:
            return None
        return torch.cat([inputs for inputs, *_ in self._samples.values()])

    def add(self, inputs: Tensor, losses: RowLosses, ids: Sequence[int] | None = None) -> None:
        """Keep a batch's samples, in place of older ones with the same ids.

        Args:
            inputs: (B, ...) of the head in the clean forward.
            losses: of the same forward, with targets and weights.
            ids: (B,) of the samples, if they have any.
        """
        assert self.head is not None
        assert losses.targets is not None
        assert losses.weights is not None
        self._mean, self._new = losses.mean or self._mean, True
        layer, samples = self.head.module, len(losses.sums)
        given = (part.detach().float() for part in (inputs, losses.targets, losses.weights))
        sums, x, *parts = to_host(losses.sums, *given)
        x = x.reshape(samples, -1, layer.in_features)
        parts = [part.reshape(samples, -1, layer.out_features) for part in parts]
        for i in sums.isfinite().nonzero().flatten().tolist():
            counted = (parts[1][i] > 0).any(1)
            if ids is None:
                self._unnamed -= 1
            key = self._unnamed if ids is None else ids[i]
            self._repeated = self._repeated or key in self._samples
            self._drop(key)
            inputs_of, targets, weights = (part[i][counted] for part in (x, *parts))
            self._samples[key] = (inputs_of, targets, weights, self.seen)
            self.seen += 1
            self._numbers += _size(self._samples[key])
        while self._numbers > MOST_NUMBERS or len(self._samples) > MOST_SAMPLES:
            self._drop(next(iter(self._samples)))

    def _drop(self, key: int) -> None:
        if key in self._samples:
            self._numbers -= _size(self._samples.pop(key))

    @property
    def samples(self) -> int:
        """The number of kept samples."""
        return len(self._samples)

    def solve(self) -> None:
        """Move the head's weights to the minimum of the loss on the kept samples."""
        assert self.head is not None
        assert self._prior is not None
        if not self._samples:
            return
        *parts, numbers = zip(*self._samples.values(), strict=True)
        x, targets, weights = (torch.cat(part).double() for part in parts)
        ages = self.age_weights(numbers)
        sizes = torch.tensor([len(part) for part in parts[0]])
        weights = weights * ages.repeat_interleave(sizes)[:, None].to(weights)
        design, fixed = self.head.design(x)
        prior, scale = self._prior.to(x), 1 / float(weights.sum().clamp(min=1e-12))
        precision = PRIOR * float(x.square().sum() / len(x))
        assert self._solution is not None
        theta = self._solution.to(x).clone()  # not from where the optimizer moved the weights

        def evaluate(theta: Tensor) -> tuple[Tensor, Tensor]:
            loss, slopes = _loss(design @ theta.T + fixed, targets, weights, self._mean)
            gradient = slopes.T @ design + precision * (theta - prior)
            return (loss + precision / 2 * (theta - prior).square().sum()) * scale, gradient * scale

        minimise(theta, evaluate)
        theta = self.agree(theta)
        if bool(theta.isfinite().all()):
            self._solution = self.head.write(theta)
            loss = _loss(design @ theta.T + fixed, targets, weights, self._mean)[0]
            elements = weights[:, :1] if self._mean == "softmax" else weights
            self.objective = float(self.agree(loss / elements.sum().clamp(min=1e-12)))

    def state_dict(self) -> State:
        """Return the kept samples, the prior's mean, and whether priming may go on."""
        if not self._samples or self._prior is None:
            return {"collecting": self._collecting}
        *parts, numbers = zip(*self._samples.values(), strict=True)
        inputs, targets, weights = (torch.cat(part) for part in parts)
        return {
            "collecting": self._collecting,
            "mean": self._mean,
            "ids": torch.tensor(list(self._samples)),
            "elements": torch.tensor([len(part) for part in parts[0]]),
            "numbers": torch.tensor(numbers),
            "seen": self.seen,
            "inputs": inputs,
            "targets": targets,
            "weights": weights,
            "prior": self._prior,
        }

    def load_state_dict(self, state: State) -> None:
        """Take up a state from `state_dict`."""
        self._collecting = flag(state["collecting"])
        if "ids" not in state:
            return
        self._samples = OrderedDict(loaded_samples(state))
        self._numbers = sum(_size(sample) for sample in self._samples.values())
        self._unnamed = min([0, *self._samples])
        self._mean, self._prior, self.seen = state["mean"], state["prior"], state["seen"]


def _size(sample: Sample) -> int:
    return sum(part.numel() for part in sample[:3])


def _loss(logits: Tensor, targets: Tensor, weights: Tensor, mean: str) -> tuple[Tensor, Tensor]:
    """Return the summed loss, up to a constant, and its derivative by the logits (N, C)."""
    if mean == "softmax":
        loss = weights[:, :1] * (
            logits.logsumexp(1, keepdim=True) - (targets * logits).sum(1, True)
        )
        return loss.sum(), weights * (logits.softmax(1) - targets)
    if mean == "sigmoid":
        loss = weights * (F.softplus(logits) - targets * logits)
        return loss.sum(), weights * (logits.sigmoid() - targets)
    error = logits - targets
    return (weights * error.square()).sum() / 2, weights * error
