"""A linear head whose outputs are the logits of the loss: its exact gradient follows from the clean
forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..base.batch import Inputs, batch_size, take
from ..base.prng import seeds
from ..base.probe import Attempt, agree
from ..base.transfer import onto
from ..objectives import Forward, Objective, RowLosses, TappedLoss
from ..objectives.elementwise import widen
from ..perturbations import ParameterVector, accumulator, displaced
from ..perturbations.noise import draw

_WIDE = 2**24  # logits of a batch; more of them would need too much memory in float64
_CHECK_SEED = 20412  # arbitrary; separates the check's noise from that of training


class ClosedFormHead:
    """The last layer of a model, whose gradient is a product of its inputs and the residuals of the
    clean forward.

    With logits `W x_i + b` and r_i the derivative of a sample's loss by its logits (for
    cross-entropy softmax - onehot), the gradient of the loss is `sum_i r_i x_i^T` for W and
    `sum_i r_i` for b. So the head is not perturbed, and deltas depend on the other parameters only.

    Args:
        module: the layer.
        names: its trainable tensors, name in the layer → name in the model.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from hf_flops.estimators import ClosedFormHead
        >>> from hf_flops.objectives import RowLosses
        >>> head = ClosedFormHead(nn.Linear(2, 1, bias=False), {"weight": "head.weight"})
        >>> clean = RowLosses(torch.ones(2), torch.ones(2), slopes=torch.tensor([[1.0], [-2.0]]))
        >>> head.gradient(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), clean).tolist()
        [-5.0, -6.0]
    """

    def __init__(self, module: nn.Linear, names: Mapping[str, str]) -> None:
        self.module, self.names = module, dict(names)
        self.vector = ParameterVector(
            [(name, getattr(module, own)) for own, name in self.names.items()]
        )

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """Return a context that yields the list of the layer's inputs in the forwards inside."""
        inputs: list[Tensor] = []
        handle = self.module.register_forward_hook(
            lambda module, args, output: inputs.append(args[0].detach())
        )
        try:
            yield inputs
        finally:
            handle.remove()

    def gradient(self, inputs: Tensor, clean: RowLosses, whole: RowLosses | None = None) -> Tensor:
        """Return the gradient (d,) of the summed loss; samples without a finite loss are left out
        and replaced by the average of the others.

        Args:
            inputs: (B, ...) of the layer.
            clean: losses of the same forward, with slopes.
            whole: losses of all samples, if `clean` is a part of them; the gradient is that of the
                part.
        """
        assert clean.slopes is not None
        device, whole = inputs.device, clean if whole is None else whole
        finite = torch.where(whole.sums.isfinite(), whole.counts, 0.0).sum()
        share = onto(torch.where(finite > 0, whole.counts.sum() / finite, 1.0), device)
        kept = onto(clean.sums.isfinite(), device)[:, None]
        given = inputs, onto(clean.slopes, device)
        x, slopes = (torch.where(kept, part.flatten(1), 0.0) for part in given)
        x = widen(x.reshape(-1, self.module.in_features))
        # float64: then the order of summation changes less than the last bit of a float32
        if slopes.numel() < _WIDE:
            x = x.to(accumulator(x.device))
        slopes = slopes.reshape(-1, self.module.out_features).to(x) * share
        parts = {"weight": slopes.T @ x, "bias": slopes.sum(0)}
        return torch.cat([parts[own].flatten() for own in self.names])

    def design(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the trained tensors multiply (..., D), and the rest of the outputs (..., C).

        Args:
            x: (..., H) inputs.
        """
        columns, fixed = [], x.new_zeros(*x.shape[:-1], self.module.out_features)
        if "weight" in self.names:
            columns.append(x)
        else:
            fixed = fixed + x @ self.module.weight.detach().to(x).T
        if "bias" in self.names:
            columns.append(x.new_ones(*x.shape[:-1], 1))
        elif self.module.bias is not None:
            fixed = fixed + self.module.bias.detach().to(x)
        return torch.cat(columns, -1), fixed

    def weights(self) -> Tensor:
        """Return (C, D) float64, the trained tensors side by side."""
        parts = [getattr(self.module, name).detach() for name in self._order()]
        return torch.cat([part.cpu().double().reshape(len(part), -1) for part in parts], 1)

    def write(self, weights: Tensor) -> Tensor:
        """Set the trained tensors to (C, D); return it float64 as rounded to their dtypes."""
        parts = [getattr(self.module, name) for name in self._order()]
        columns = weights.split([part[0].numel() for part in parts], 1)
        rounded = [own.to(part.dtype) for own, part in zip(columns, parts, strict=True)]
        for own, part in zip(rounded, parts, strict=True):
            part.data.copy_(own.reshape(part.shape), non_blocking=True)
        return torch.cat([own.double() for own in rounded], 1)

    def _order(self) -> list[str]:
        return [name for name in ("weight", "bias") if name in self.names]


def find_head(
    model: nn.Module,
    objective: Objective,
    forward: Forward,
    inputs: Inputs,
    frozen: Collection[str] = (),
) -> ClosedFormHead | None:
    """Return the trainable linear layer that computes the logits, or None; None also if no other
    tensor is trained.

    Its output must be bitwise equal to the loss function's input, also after its parameters have
    been changed.

    Args:
        model: the model, in evaluation mode, gradients off.
        objective: what is minimised.
        forward: runs the model.
        inputs: a batch.
        frozen: names of trainable tensors that are not trained at present.
    """
    if not (isinstance(objective, TappedLoss) or objective.logits):
        return None
    few = take(inputs, torch.arange(min(4, batch_size(inputs))))
    heads, trained = _candidates(model), set(ParameterVector.of(model).names)
    tapped = isinstance(objective, TappedLoss)
    watched = TappedLoss(logits=True) if tapped else objective
    for head, x in zip(heads, _given(heads, watched, forward, few), strict=True):
        own = set(head.names.values())
        alone = tapped and trained - set(frozen) <= own
        if (
            x is not None
            and not alone
            and own.isdisjoint(frozen)
            and _agrees(head, x, watched, forward, few)
        ):
            return head
    return None


def _candidates(model: nn.Module) -> list[ClosedFormHead]:
    """Return the linear layers with trainable tensors that belong to no other module."""
    users = Counter(
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    heads = []
    for module in model.modules():
        if type(module) is nn.Linear:
            own = {
                name: p
                for name, p in module._parameters.items()
                if p is not None and p.requires_grad
            }
            if own and all(users[id(p)] == 1 for p in own.values()):
                heads.append(
                    ClosedFormHead(module, {name: names[id(p)] for name, p in own.items()})
                )
    return heads


def _given(
    heads: Sequence[ClosedFormHead],
    objective: Objective,
    forward: Forward,
    inputs: Inputs,
) -> list[Tensor | None]:
    """Return the input of each head; None if it was called more than once or its output is not the
    logits.
    """
    outputs: dict[nn.Module, list[Tensor]] = {head.module: [] for head in heads}
    with ExitStack() as stack:
        seen = [stack.enter_context(head.watched()) for head in heads]
        for head in heads:
            hook = head.module.register_forward_hook(
                lambda module, args, out: outputs[module].append(out.detach())
            )
            stack.callback(hook.remove)
        logits = objective(forward, inputs).logits
    assert logits is not None
    wanted = widen(logits).reshape(-1)
    return [
        given[0]
        if len(given) == 1 and torch.equal(widen(outputs[head.module][0]).reshape(-1), wanted)
        else None
        for head, given in zip(heads, seen, strict=True)
    ]


def _agrees(
    head: ClosedFormHead,
    x: Tensor,
    objective: Objective,
    forward: Forward,
    inputs: Inputs,
) -> bool:
    """Return whether the logits change with the head's parameters as a linear layer's output
    does.
    """
    vector = head.vector
    shift = draw("gaussian", seeds(_CHECK_SEED, 0), vector.shapes, vector.device)[0]
    wanted = list[Tensor]()
    with (
        Attempt("The head stays under noise"),
        displaced(vector, shift),
        head.watched() as seen,
        # its output in the forward itself, which may run under autocast
        head.module.register_forward_hook(lambda module, args, out: wanted.append(out.detach())),
    ):
        moved = objective(forward, inputs).logits
        if moved is not None and len(seen) == 1 and torch.equal(seen[0], x):
            return agree(widen(moved).reshape(-1), widen(wanted[0]).reshape(-1), 5e-4)
    return False
