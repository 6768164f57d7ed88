"""Which tensors can have noise per row.

Nothing is taken on trust. A rule is used only after it gave the same row losses as an explicit
change of the parameters; this catches modules that are called in unexpected ways (DoRA, attention
that reads weights directly, routed experts).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..base.batch import Inputs
from ..base.prng import seeds
from ..base.probe import Attempt
from ..errors import ConfigurationError
from ..objectives import Forward, Objective
from ..perturbations import (
    NoiseKeys,
    ParameterVector,
    Perturbation,
    PinCheck,
    RowMismatch,
    RowwiseNoise,
    displaced,
    perturb,
)
from ..perturbations.noise import draw
from .row_loss_check import CHECK_SEED, moved_parameters, two_rows

Sums = Callable[[], Tensor]
# tried in turn until the loss moves enough to tell right from wrong
_SCALES = (0.02, 0.1, 0.5, 2.0)


@dataclass
class Verdict:
    """The result of the self-check: names of tensors.

    Attributes:
        rowwise: their per-row rule is right.
        row_by_row: only running their layers row by row is right.
        wrong: no rule is right.
        idle: the loss does not depend on them.
    """

    rowwise: set[str] = field(default_factory=set)
    row_by_row: set[str] = field(default_factory=set)
    wrong: set[str] = field(default_factory=set)
    idle: set[str] = field(default_factory=set)

    def notes(self, names: Sequence[str]) -> Iterator[str]:
        """Yield messages for the user about the trainable tensors `names`."""
        if self.wrong:
            yield (
                f"{len(self.wrong)} of {len(names)} trainable tensors get noise that is shared by "
                "the batch, because no per-row rule is right for them: "
                f"{_some(self.wrong)}. Leaving them out of what is trained avoids it."
            )
        if self.row_by_row:
            yield (
                f"The layers of {_some(self.row_by_row)} run once for each row, because no rule "
                "for all rows at once is right for them; where that takes too long, "
                'perturbation="shared" avoids it.'
            )
        if self.idle:
            yield f"The loss does not depend on {_some(self.idle)}; left as they are."


class RuleCheck:
    """Compares per-row rules with explicit changes of the parameters, on two rows.

    Args:
        model: the model, in evaluation mode.
        sums: runs the two rows through the model and returns their loss sums (2,).
        precision: relative error of a loss that rounding alone can cause.
    """

    def __init__(self, model: nn.Module, sums: Sums, precision: float) -> None:
        self.model, self.sums, self.precision = model, sums, precision

    def run(self, names: Iterable[str]) -> Verdict:
        """Find for each name a rule that is right.

        All tensors are moved off their starting values first: at its initialisation `lora_B = 0`
        hides what happens to `lora_A`. Tensors that differ in layer numbers only are tried
        together, and share the verdict.
        """
        alike: dict[str, list[str]] = {}
        for name in names:
            alike.setdefault(re.sub(r"\d+", "#", name), []).append(name)
        verdict = Verdict()
        with moved_parameters(self.model):
            for group in alike.values():
                self._judge(group, verdict)
            # Running a layer row by row affects its other tensors too: check all together.
            if verdict.row_by_row and not self._agrees(
                [*verdict.rowwise, *verdict.row_by_row], set(), verdict.row_by_row
            ):
                verdict.wrong |= verdict.rowwise | verdict.row_by_row
                verdict.rowwise, verdict.row_by_row = set(), set()
        return verdict

    def _judge(self, group: list[str], verdict: Verdict) -> None:
        """Try a rule that sees all rows together, and else one that runs a layer row by row."""
        for row_by_row in (set[str](), set(group)):
            fired: set[str] = set()
            if self._agrees(group, fired, row_by_row):
                silent = {name for name in group if name not in fired}
                if not silent or not self._matters(silent):
                    verdict.idle |= silent
                    (verdict.row_by_row if row_by_row else verdict.rowwise).update(fired)
                    return
        verdict.wrong.update(group)

    def _shifted(self, vector: ParameterVector, shift: Tensor) -> Tensor:
        """Return the loss sums (2,) with the parameters moved by `shift` (d,)."""
        with displaced(vector, shift):
            return self.sums()

    def _agrees(self, names: Sequence[str], fired: set[str], row_by_row: Collection[str]) -> bool:
        vector = ParameterVector.of(self.model, set(names))
        try:
            rowwise = RowwiseNoise(self.model, vector, "gaussian", row_by_row)
        except RowMismatch:  # a tensor without a rule
            return False
        noise = rowwise.draw(NoiseKeys(seeds(CHECK_SEED, 1, torch.arange(2).numpy()), 0))
        start = self.sums()
        for scale in _SCALES:
            ran: Counter[int] = Counter()
            with (
                Attempt(f"Noise per row does not fit {_some(names)}") as attempt,
                rowwise.applied(noise, scale, ran),
            ):
                losses = self.sums()
            if attempt.reason is not None:
                return False
            wanted = torch.stack(
                [self._shifted(vector, scale * noise[row])[row] for row in range(2)]
            )
            change = float((wanted - start).abs().max())
            floor = self.precision * float(start.abs().max())
            if change > 10 * floor:
                break
        fired.update(vector.names[index] for index in ran)
        error, exact = float((losses - wanted).abs().max()), self.precision < 1e-3
        if any(times > 1 for times in ran.values()) and (not exact or change <= 10 * floor):
            return False  # a module that is called more than once is trusted only on clear evidence
        return error <= (0.05 * floor + 1e-3 * change if exact else floor + 0.1 * change)

    def _matters(self, names: Collection[str]) -> bool:
        vector = ParameterVector.of(self.model, set(names))
        noise = draw("gaussian", seeds(CHECK_SEED, 2), vector.shapes, vector.device)[0]
        start = self.sums()
        floor = self.precision * float(start.abs().max())
        return any(
            float((self._shifted(vector, scale * noise) - start).abs().max()) > floor
            for scale in _SCALES
        )


def _some(names: Iterable[str], most: int = 3) -> str:
    """List a few names."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def choose_perturbation(
    model: nn.Module,
    objective: Objective,
    forward: Forward,
    inputs: Inputs,
    *,
    mode: str = "auto",
    distribution: str = "rademacher",
    precision: float = 1e-4,
    frozen: Container[str] = (),
    replayed: bool = True,
) -> tuple[Perturbation, list[str]]:
    """Return the perturbation for every trainable tensor, and messages for the user.

    Args:
        model: the model, in evaluation mode, gradients off.
        objective: what is minimised.
        forward: runs the model.
        inputs: a batch.
        mode: "auto" (per row where that is right, shared elsewhere, and on the outputs of heads
            that see one token of each row where that needs fewer random numbers), "weights" (the
            same but never on outputs), "activation" (on outputs wherever that is right), "rowwise"
            (an error where it is not right) or "shared".
        distribution: a name in `DISTRIBUTIONS`.
        precision: see `precision_of`.
        frozen: names of trainable tensors that stay as they are for now.
        replayed: whether noise may be such that it takes a forward to draw it again.

    Raises:
        ConfigurationError: nothing is trainable, or `mode="rowwise"` cannot be had.
    """
    names = ParameterVector.of(model).names
    if not names:
        raise ConfigurationError(
            "The model has no trainable parameter: add an adapter (peft_config=) or unfreeze a "
            "head."
        )
    names = [name for name in names if name not in frozen]
    if not names:
        raise ConfigurationError(
            "All trainable parameters are held back: there is nothing but lora_A to train."
        )
    if mode == "shared" or not objective.per_row:
        return perturb(model, shared=names, distribution=distribution), []
    pair = two_rows(objective, forward, inputs)

    def sums() -> Tensor:
        return objective(forward, pair).sums

    verdict = RuleCheck(model, sums, precision).run(names)
    shared = [name for name in names if name in verdict.wrong]
    if shared and mode == "rowwise":
        raise ConfigurationError(
            f'perturbation="rowwise" has no rule that is right for {_some(shared)}: use "auto" or '
            '"shared".'
        )
    rowwise = [name for name in names if name in verdict.rowwise | verdict.row_by_row]
    if not rowwise and not shared:
        raise ConfigurationError("The loss depends on none of the trainable parameters.")
    activation: list[str] = []
    if mode in ("auto", "activation") and verdict.rowwise and replayed:
        activation = PinCheck(model, sums, precision).run(verdict.rowwise, smaller=mode == "auto")
    perturbation = perturb(
        model,
        rowwise=[name for name in rowwise if name not in activation],
        shared=shared,
        activation=activation,
        row_by_row=verdict.row_by_row,
        distribution=distribution,
    )
    return perturbation, list(verdict.notes(names))
