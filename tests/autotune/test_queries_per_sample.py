"""Queries per sample that follow the signal-to-noise ratio."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_flops import ConfigurationError, FlopsTrainer, FlopsTrainingArguments, Method, StepResult
from hf_flops.allocators import Optimal, Uniform
from hf_flops.autotune.queries_per_sample import MOST, AutoQueries
from hf_flops.estimators import Antithetic, OneSided
from hf_flops.objectives import TappedLoss
from hf_flops.perturbations import perturb
from tests.estimators.test_closed_form_head import adapted
from tests.helpers.tiny import as_dataset, tiny_batch, tiny_model

MODEL = tiny_model("vit")


def method(estimator, allocator):
    perturbation = perturb(MODEL, shared=["classifier.bias"])
    return Method(TappedLoss(), perturbation, estimator, allocator, 4, 1e-3, 8)


def settled(signal, variance, how, head=0.0, steps=60):
    """Return rows per sample after many steps that all found the same."""
    auto = AutoQueries()
    for step in range(steps):
        queries = (auto.at(step) - how.needs_clean) // len(how.estimator.signs)
        metrics = {
            "gradient_signal": signal,
            "gradient_variance": variance / queries,
            "head_signal": head,
        }
        auto.update(
            StepResult(torch.tensor(0.0), 0, torch.tensor([queries]), torch.ones(1), metrics), how
        )
    return auto.at(steps)


@given(st.floats(0.01, 100), st.floats(0.01, 1e5))
def test_no_other_number_gains_more_per_row(signal, variance):
    how = method(OneSided(), Optimal())
    rows = settled(signal, variance, how)

    def gain(rows):
        return signal**2 / (signal + variance / (rows - 1)) / rows

    assert 2 <= rows <= MOST
    assert gain(rows) >= 0.999 * max(
        gain(other) for other in range(2, MOST + 1) if abs(other - rows) > 1
    )


def test_what_it_depends_on():
    how = method(OneSided(), Optimal())
    assert settled(1.0, 1e4, how, head=1e4) == 2  # the head's gradient is clear
    assert settled(-1.0, 1e4, how) == MOST  # no signal at all
    # no clean row to share: the fewest are best
    assert settled(1.0, 1e4, method(Antithetic(), Uniform())) == 2


def test_all_batches_of_a_step_get_the_same():
    auto, how = AutoQueries(), method(OneSided(), Optimal())
    before = auto.at(0)
    metrics = {"gradient_signal": 1.0, "gradient_variance": 1e4, "head_signal": 0.0}
    auto.update(StepResult(torch.tensor(0.0), 0, torch.tensor([3]), torch.ones(1), metrics), how)
    assert auto.at(0) == before < auto.at(1)


def test_the_trainer_follows_it_and_a_resumed_run_goes_on_alike(tmp_path):
    data, model = as_dataset(tiny_batch("vit", samples=16)), adapted("vit")
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def trained(folder, **options):
        model.load_state_dict(start)
        args = FlopsTrainingArguments(
            output_dir=str(folder),
            queries_per_sample="auto",
            max_steps=8,
            per_device_train_batch_size=4,
            rows_per_forward=16,
            report_to="none",
            learning_rate=0.01,
            save_steps=4,
            save_strategy="steps",
        )
        trainer = FlopsTrainer(model=model, args=args, train_dataset=data)
        trainer.train(**options)
        return trainer, torch.cat(
            [p.detach().flatten().clone() for p in model.parameters() if p.requires_grad]
        )

    whole, found = trained(tmp_path)
    assert whole.ledger.rows != 8 * 4 * 4  # it did change
    resumed, again = trained(
        tmp_path / "other", resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    assert resumed.ledger.rows == whole.ledger.rows
    assert torch.equal(found, again)


def test_a_word_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="queries_per_sample='many'"):
        FlopsTrainingArguments(output_dir=str(tmp_path), queries_per_sample="many")
