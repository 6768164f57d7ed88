"""Macro F1 as the objective: the score, what an answer adds to it, and that training improves
it.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from hf_flops import FlopsTrainer, MacroF1, ObjectiveError
from hf_flops.objectives.macro_f1 import macro_f1
from tests.helpers.tiny import as_dataset, tiny_batch, tiny_model
from tests.objectives.test_metrics import arguments, built

PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


def confusion_of(labels, found, classes=4):
    return torch.zeros(classes, classes, dtype=torch.float64).index_put_(
        (labels, found), torch.ones(len(labels), dtype=torch.float64), accumulate=True
    )


def score_of(labels, found):
    return f1_score(
        labels, found, labels=sorted(set(labels.tolist())), average="macro", zero_division=0
    )


def judged(labels, found, objective=None):
    """Return what an objective finds for answers, given as logits."""
    outputs = SimpleNamespace(logits=torch.nn.functional.one_hot(found, 4).float())
    return (objective or MacroF1())(lambda inputs: (None, outputs), {"labels": labels})


@given(pairs=PAIRS)
def test_the_score_and_its_derivative(pairs):
    labels, found = (torch.tensor(own) for own in zip(*pairs, strict=True))
    confusion = confusion_of(labels, found)
    score, derivative = macro_f1(confusion)
    assert float(score) == pytest.approx(score_of(labels, found))
    given = confusion.clone().requires_grad_()
    totals = (given.sum(0) + confusion.sum(1)).clamp(min=1)  # labels are what they are
    present = confusion.sum(1) > 0
    (2 * given.diagonal() / totals)[present].mean().backward()
    kept = present & (totals > 0)
    torch.testing.assert_close(derivative[:, kept], given.grad[:, kept])
    assert (derivative[:, ~present] == 0).all()


@given(pairs=PAIRS)
def test_clean_rows_have_the_score_and_queries_what_they_change(pairs):
    labels, found = (torch.tensor(own) for own in zip(*pairs, strict=True))
    objective, clean = MacroF1().bind_batch(judged(labels, found), {"labels": labels})
    assert float(clean.sums.mean()) == pytest.approx(-score_of(labels, found), abs=1e-6)
    # a query that changes nothing
    torch.testing.assert_close(judged(labels, found, objective).sums, clean.sums)
    assert MacroF1().worths is None  # a new one for every batch


def test_what_an_answer_adds_is_the_change_of_the_score():
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(
        torch.tensor([0.6, 0.25, 0.1, 0.05]), 2000, replacement=True, generator=generator
    )
    found = torch.where(
        torch.rand(2000, generator=generator) < 0.5, labels, labels[torch.randperm(2000)]
    )
    objective, clean = MacroF1().bind_batch(judged(labels, found), {"labels": labels})
    for row in range(20):
        for answer in range(4):
            other = found.clone()
            other[row] = answer
            change = 2000 * (score_of(labels, other) - score_of(labels, found))
            worth = clean.sums[row] - judged(labels, other, objective).sums[row]
            assert float(worth) == pytest.approx(change, rel=0.05, abs=0.01)


def trained(folder, *, rare=4, dtype=torch.float32, **options):
    """Train the classifier of a tiny ViT on two classes, one of them rare; returns the trainer."""
    model = built(lambda: tiny_model("vit"))
    model.requires_grad_(False).classifier.requires_grad_(True)
    batch = {**tiny_batch("vit", 16), "labels": (torch.arange(16) < rare).long()}
    options = {"per_device_train_batch_size": 16, "queries_per_sample": 16, **options}
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    args, data = arguments(folder, **options), as_dataset(batch)
    trainer = FlopsTrainer(model.to(dtype), args, train_dataset=data, objective=MacroF1())
    trainer.train()
    return trainer


@pytest.mark.parametrize("estimator", ["one_sided", "antithetic"])
def test_training_improves_macro_f1_of_a_rare_class(estimator, tmp_path):
    trainer = trained(
        tmp_path, estimator=estimator, max_steps=30, learning_rate=0.1, lr_scheduler_type="constant"
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > -0.6
    assert sum(losses[-3:]) / 3 < losses[0] - 0.2


def test_neither_chunks_nor_the_order_of_samples_matter(tmp_path):
    options = {
        "max_steps": 1,
        "perturbation_scale": 1.0,
        "optim": "sgd",
        "learning_rate": 1.0,
        "dtype": torch.float64,
    }
    states = [
        copy.deepcopy(
            trained(tmp_path, rows_per_forward=rows, **options).model.classifier.state_dict()
        )
        for rows in (5, 256)
    ]
    start = built(lambda: tiny_model("vit")).double().classifier.state_dict()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-5, atol=1e-6)
    assert any(not value.equal(start[name]) for name, value in states[0].items())


def test_what_has_no_answer_for_each_row_is_refused():
    with pytest.raises(ObjectiveError, match=r"MacroF1 needs labels from 0 to 3, not -100 to 1\."):
        judged(torch.tensor([1, -100]), torch.tensor([1, 1]))
    with pytest.raises(
        ObjectiveError, match=r"MacroF1 needs logits \(R, classes\) and labels \(R,\)"
    ):
        MacroF1()(
            lambda inputs: (None, SimpleNamespace(logits=torch.zeros(2, 3, 4))),
            {"labels": torch.zeros(2)},
        )
