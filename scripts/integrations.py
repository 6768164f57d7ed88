"""Runs the trainers of tests/trainer/test_integrations.py and writes docs/integrations.md.

It needs the extra `trl`. A test makes sure that each trains.
"""

from __future__ import annotations

import sys
from functools import wraps
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest

from hf_flops import FlopsTrainerMixin
from hf_flops.objectives import BatchLoss, CoupledLoss, TappedLoss
from hf_flops.perturbations import SharedNoise

PAGE = ROOT / "docs" / "integrations.md"
TESTS = ROOT / "tests" / "trainer" / "test_integrations.py"
HEAD = """# Trainers of other libraries

A trainer of TRL or sentence-transformers takes two statements:

    class SFT(FlopsTrainerMixin, trl.SFTTrainer): ...

    @dataclass
    class SFTArguments(FlopsArgumentsMixin, trl.SFTConfig): ...

It then logs its own metrics, those of one forward per batch. The table is written by
`scripts/integrations.py`, which trains each on a tiny model. *Tapped*: torch's loss function is
split where it is called. *Each row*: the model runs once, and the loss is computed again for each
row, with the recorded outputs of that row. *With its batch*: the loss is no sum over rows; it is
computed for the whole batch, with the recorded outputs of one row replaced.

| trainer | set-up | loss | noise |
| --- | --- | --- | --- |
"""
FOOT = """
Packed texts are unpacked, and each is a sample. Chosen and rejected texts are one sample. The
patches of Qwen-VL's images follow the samples that have their tokens; adapters of the vision tower
itself, which sees the patches of all images at once, have shared noise.

The general way costs rows per second where the tap is not right: on the processor 0.94 of the tap's
for MiniLM (64 rows; median of 7 turns) and 0.91 for SmolLM2-135M (8 rows; 2 turns on a busy
machine), on the same losses and rows (`benchmarks/general_way.py`).

GRPO, RLOO and PPO compare the model with a detached copy of itself: on policy the value of their
loss is constant, so forward passes cannot train it, and the first step refuses it. Train the reward
itself: `objective=GeneratedMetric(reward, tokenizer)` with `FlopsTrainer`, where `reward` maps
texts and inputs to numbers.

What a loss takes from the model without gradients, as KTO its estimate of a divergence, stays that
of the clean forward, as for backpropagation; so do values inside `torch.no_grad`, from `detach` and
from `item`. Such a loss is computed with its batch. Where it cannot be (`perturbation="shared"`,
several processes), it is refused. Values that a model detaches inside its own forward, or an
`objective=` of your own, are not held: noise moves them.

A loss that reads trainable parameters itself (a
temperature) and is no sum over rows is taken for the batch as a whole, with shared noise; so are
all losses that are no sums over rows in a run of several processes.
"""


class Table:
    """A plugin of pytest that notes how each trainer has trained."""

    def __init__(self) -> None:
        self.test, self.rows = "", list[str]()

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Note which test runs."""
        self.test = item.name

    def note(self, trainer: FlopsTrainerMixin) -> None:
        """Add a row for a trainer that has trained."""
        if "gradient" in self.test:
            return
        chosen = trainer.session.chosen  # type: ignore[attr-defined]
        kinds = {
            TappedLoss: "tapped",
            CoupledLoss: "with its batch",
            BatchLoss: "whole batch",
        }
        shared = [isinstance(part, SharedNoise) for part in chosen.perturbation.parts]
        noise = "shared" if all(shared) else "in part shared" if any(shared) else "per row"
        setup = self.test.partition("[")[2].rstrip("]") or "default"
        stock = next(
            c.__name__
            for c in type(trainer).__mro__
            if "hf_flops" not in c.__module__ and "test_" not in c.__module__
        )
        loss = kinds.get(type(chosen.objective), "each row")
        self.rows.append(f"| {stock} | {setup} | {loss} | {noise} |")


def main() -> None:
    """Write the page."""
    table, train = Table(), FlopsTrainerMixin.train

    @wraps(train)
    def noted(self: FlopsTrainerMixin, *args: object, **options: object) -> object:
        result = train(self, *args, **options)  # type: ignore[arg-type]
        table.note(self)
        return result

    FlopsTrainerMixin.train = noted  # type: ignore[method-assign, assignment]
    code = pytest.main(["-q", "-n", "0", "-rs", "--assert=plain", str(TESTS)], plugins=[table])
    if code:
        raise SystemExit(code)
    PAGE.write_text(HEAD + "\n".join(table.rows) + "\n" + FOOT)


if __name__ == "__main__":
    main()
