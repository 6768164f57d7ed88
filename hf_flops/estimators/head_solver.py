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
from .head_state import Sample, check_same_head, loaded_samples

# of the kept samples, 64 MiB, and of samples, over which every step solves; the oldest are dropped
MOST_NUMBERS, MOST_SAMPLES = 2**24, 2**16
_LEAST_PER_LOGIT = 64  # samples that must fit for each logit, or the solution would be poor
PRIMING_SAMPLES = 4096  # at most so many clean rows are run before the first query
PRIMING_SHARE = 0.1  # of the run's optimizer steps, at most
_ITERATIONS = 10  # of L-BFGS per optimizer step, from the weights of the step before
_KEPT = 0.5  # weight of a sample after as many others as there are kept samples
# precision of the Gaussian prior on the weights over the mean squared norm of the inputs; the loss
# is a sum over samples
_PRIOR = 0.003


class HeadSolver:
    """Keeps what clean forwards show of a linear head's inputs and targets, and solves for the
    head's weights after each optimizer step, both on the CPU: the many short steps of L-BFGS would
    each wait for a device.

    The loss is that of a generalised linear model (softmax, logistic or linear regression), so it
    is convex in the weights. A Gaussian prior around the weights at the start keeps the solution
    finite where the classes can be separated. No forward pass is needed. The head has no learning
    rate: its exact gradient is in `.grad`, but where the optimizer moves it to is left again.

    While the adapter moves, the inputs of samples that were seen long ago are out of date: their
    weight halves whenever as many samples have been seen as are kept.

    While the kept samples are few, queries would be wasted on the gradient of a head that is about
    to move. So a run begins with *priming*: optimizer steps that run clean rows only, until the
    first epoch ends, 4,096 samples are known, or a tenth of the run is over.

    Args:
        agree: returns the tensor of process 0.

    Attributes:
        seen: samples that were added so far.
        objective: mean loss of the kept samples' elements under the solved head; None before the
            first solution.

    Example:
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
        self.agree = agree
        self.head: ClosedFormHead | None = None
        self.objective: float | None = None
        self._mean = "softmax"
        # the sample's id, or a negative number → sample, oldest first
        self._samples: OrderedDict[int, Sample] = OrderedDict()
        self._numbers = self._unnamed = 0
        self._prior: Tensor | None = None
        self._solution: Tensor | None = None  # the weights of the last solution
        self._collecting, self._repeated = True, False
        self.seen = 0
        self._new = False  # whether samples were added since the last step

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
            self._prior = self._weights()
        elif self._solution is None:
            features = head.module.in_features
            check_same_head(self._samples.values(), self._prior, self._weights(), features)
        if self._solution is None:
            self._solution = self._weights()

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

    def discard(self) -> None:
        """Do not solve after this optimizer step, which is not taken."""
        self._new = False

    def primes(self, step: int, steps: int) -> bool:
        """Return whether an optimizer step of a run of so many `steps` runs clean rows only."""
        return self._collecting and step + 1 <= PRIMING_SHARE * steps

    def finish_step(self, epoch: float) -> None:
        """Solve for the weights after an optimizer step, now that so many epochs are done."""
        if not self._new:
            return
        self._new = False
        self.solve()
        seen = self._repeated or epoch >= 1 - 1e-6
        self._collecting = not seen and len(self._samples) < PRIMING_SAMPLES

    def solve(self) -> None:
        """Move the head's weights to the minimum of the loss on the kept samples."""
        assert self.head is not None
        assert self._prior is not None
        if not self._samples:
            return
        *parts, numbers = zip(*self._samples.values(), strict=True)
        x, targets, weights = (torch.cat(part).double() for part in parts)
        ages = (self.seen - torch.tensor(numbers).double()) / len(numbers)
        sizes = torch.tensor([len(part) for part in parts[0]])
        weights = weights * (_KEPT**ages).repeat_interleave(sizes)[:, None].to(weights)
        design, fixed = self._design(x)
        prior, scale = self._prior.to(x), 1 / float(weights.sum().clamp(min=1e-12))
        precision = _PRIOR * float(x.square().sum() / len(x))
        assert self._solution is not None
        theta = self._solution.to(x).clone()  # not from where the optimizer moved the weights
        optimizer = torch.optim.LBFGS(
            [theta],
            max_iter=_ITERATIONS,
            tolerance_grad=1e-7,
            tolerance_change=1e-10,
            line_search_fn="strong_wolfe",
        )

        def closure() -> float:
            loss, slopes = _loss(design @ theta.T + fixed, targets, weights, self._mean)
            theta.grad = (slopes.T @ design + precision * (theta - prior)) * scale
            return float(loss + precision / 2 * (theta - prior).square().sum()) * scale

        optimizer.step(closure)
        theta = self.agree(theta)
        if bool(theta.isfinite().all()):
            self._solution = self._written(theta)
            loss = _loss(design @ theta.T + fixed, targets, weights, self._mean)[0]
            elements = weights[:, :1] if self._mean == "softmax" else weights
            self.objective = float(self.agree(loss / elements.sum().clamp(min=1e-12)))

    def _design(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N, D), what the trained tensors multiply, and (N, C), the rest of the logits."""
        assert self.head is not None
        layer, names = self.head.module, self.head.names
        columns, fixed = [], x.new_zeros(len(x), layer.out_features)
        if "weight" in names:
            columns.append(x)
        else:
            fixed = fixed + x @ layer.weight.detach().to(x).T
        if "bias" in names:
            columns.append(x.new_ones(len(x), 1))
        elif layer.bias is not None:
            fixed = fixed + layer.bias.detach().to(x)
        return torch.cat(columns, 1), fixed

    def _weights(self) -> Tensor:
        """Return (C, D) float64, the trained tensors side by side."""
        assert self.head is not None
        parts = [getattr(self.head.module, name).detach() for name in self._order()]
        return torch.cat([part.cpu().double().reshape(len(part), -1) for part in parts], 1)

    def _written(self, theta: Tensor) -> Tensor:
        """Write the weights into the layer; return them as rounded to its dtype."""
        assert self.head is not None
        parts = [getattr(self.head.module, name) for name in self._order()]
        columns = theta.split([part[0].numel() for part in parts], 1)
        rounded = [own.to(part.dtype) for own, part in zip(columns, parts, strict=True)]
        for own, part in zip(rounded, parts, strict=True):
            part.data.copy_(own.reshape(part.shape), non_blocking=True)
        return torch.cat([own.double() for own in rounded], 1)

    def _order(self) -> list[str]:
        assert self.head is not None
        return [name for name in ("weight", "bias") if name in self.head.names]

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
