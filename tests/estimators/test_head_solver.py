"""Heads that are solved: the solution is the one of a general optimizer, and nothing is lost."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from hf_flops import FlopsTrainer, FlopsTrainingArguments
from hf_flops.estimators import ClosedFormHead, HeadSolver, feature_solver, find_head, head_solver
from hf_flops.objectives import RowLosses, TappedLoss
from tests.estimators.test_closed_form_head import adapted
from tests.helpers.tiny import as_dataset, generator, model_forward, tiny_batch

SAMPLES, WIDTH = 60, 4


class Head(nn.Module):
    """A linear head on its inputs, with a loss of torch's."""

    def __init__(self, loss, classes=3, bias=True):
        super().__init__()
        self.linear = nn.Linear(WIDTH, classes, bias=bias).double()
        self.other = nn.Parameter(torch.zeros(()))
        self.loss = loss

    def forward(self, x, labels):
        logits = self.linear(x + self.other)
        return type("Output", (), {"loss": self.loss(logits, labels), "logits": logits})


def soft(logits, labels):
    return F.cross_entropy(
        logits, labels, label_smoothing=0.1, weight=torch.arange(1.0, 4).double()
    )


def pairs(logits, labels):
    return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=torch.tensor(2.0).double())


CLASSES = torch.randint(3, (SAMPLES,), generator=generator(1))
NUMBERS = torch.randn(SAMPLES, 3, generator=generator(2)).double()
CASES = {
    "softmax": (F.cross_entropy, CLASSES),
    "weights and smoothing": (soft, CLASSES),
    "ignored": (F.cross_entropy, torch.where(torch.arange(SAMPLES) % 5 == 0, -100, CLASSES)),
    "soft labels": (F.cross_entropy, NUMBERS.softmax(1)),
    "sigmoid": (pairs, (NUMBERS > 0).double()),
    "regression": (F.mse_loss, NUMBERS),
}


def precision_of(solver):
    """The precision of the prior."""
    return head_solver.PRIOR * float(solver.features().square().sum(1).mean())


def inputs_of(labels):
    x = torch.randn(SAMPLES, WIDTH, generator=generator(3)).double()
    return {"x": x, "labels": labels}


@torch.no_grad()
def solver_of(model, inputs, ids=None):
    objective, forward = TappedLoss(logits=True), model_forward(model)
    objective.targets = True
    head = find_head(model, objective, forward, inputs)
    assert head is not None
    solver = HeadSolver()
    solver.bind(head)
    with head.watched() as seen:
        losses = objective(forward, inputs, features=True)
    solver.add(seen[0], losses, ids)
    return solver


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_solution_has_no_gradient_but_the_priors(name, bias, monkeypatch):
    monkeypatch.setattr(head_solver, "PRIOR", 0.1)
    monkeypatch.setattr(feature_solver, "KEPT", 1.0)
    loss, labels = CASES[name]
    model, inputs = Head(loss, bias=bias), inputs_of(labels)
    start = model.linear.weight.detach().clone()
    solver = solver_of(model, inputs)
    for _ in range(10):
        solver.solve()
    counts = TappedLoss()(model_forward(model), inputs).counts.sum()
    model.zero_grad()
    gradient = torch.autograd.grad(model(**inputs).loss, model.linear.weight)[0] * counts
    prior = precision_of(solver) * (model.linear.weight.detach() - start)
    assert (gradient + prior).norm() < 1e-2 * prior.norm()
    assert prior.norm() > 0.1


def test_it_agrees_with_logistic_regression(monkeypatch):
    monkeypatch.setattr(feature_solver, "KEPT", 1.0)
    model, inputs = Head(F.cross_entropy, bias=False), inputs_of(CLASSES)
    with torch.no_grad():
        model.linear.weight.zero_()
    solver = solver_of(model, inputs)
    for _ in range(10):
        solver.solve()
    wanted = LogisticRegression(
        C=1 / precision_of(solver), fit_intercept=False, tol=1e-8, max_iter=1000
    ).fit(inputs["x"].numpy(), CLASSES.numpy())
    assert torch.allclose(model.linear.weight, torch.tensor(wanted.coef_), atol=1e-3)


def test_samples_with_ids_are_replaced_and_the_oldest_dropped(monkeypatch):
    model, inputs = Head(F.cross_entropy), inputs_of(CLASSES)
    solver = solver_of(model, inputs, ids=range(SAMPLES))
    assert solver.features().shape == (SAMPLES, WIDTH)
    again = solver_of(model, {name: value[:10] for name, value in inputs.items()}, ids=range(10))
    assert len(again.features()) == 10
    other = HeadSolver()
    other.bind(solver.head)
    per_sample = WIDTH + 2 * 3
    monkeypatch.setattr(head_solver, "MOST_NUMBERS", 25 * per_sample)
    losses = TappedLoss(logits=True)
    losses.targets = True
    found = losses(model_forward(model), inputs, features=True)
    for _ in range(2):
        other.add(inputs["x"], found)
    assert torch.equal(other.features(), inputs["x"][-25:].float())


def test_a_sample_that_came_long_ago_counts_less():
    model = Head(F.mse_loss, classes=1, bias=False)
    x = torch.ones(20, WIDTH).double()
    labels = torch.cat([torch.zeros(10, 1), torch.ones(10, 1)]).double()
    solver = solver_of(model, {"x": x, "labels": labels})
    for _ in range(10):
        solver.solve()
    prediction = model.linear(x[:1]).item()
    assert 0.53 < prediction < 0.7  # equal weights: at most 0.5 with a prior around small weights


def test_a_state_restores_everything():
    model, inputs = Head(F.cross_entropy), inputs_of(CLASSES)
    solver = solver_of(model, inputs, ids=range(SAMPLES))
    solver.finish_step(epoch=0.5)
    again = HeadSolver()
    again.load_state_dict(solver.state_dict())
    again.bind(ClosedFormHead(solver.head.module, solver.head.names))
    before = model.linear.weight.detach().clone()
    solver.solve()
    after = model.linear.weight.detach().clone()
    with torch.no_grad():
        model.linear.weight.copy_(before)
    again.solve()
    assert torch.equal(model.linear.weight, after)
    assert again.primes(0, 100) == solver.primes(0, 100)


@pytest.mark.parametrize(("steps", "primed"), [(3, 0), (10, 1), (40, 2)])
def test_a_run_begins_with_clean_rows_of_one_epoch_at_most(steps, primed, tmp_path):
    inputs, rows = tiny_batch("bert", samples=16), []
    args = FlopsTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=8,
        queries_per_sample=4,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        optim="sgd",
        learning_rate=1e-4,
    )
    trainer = FlopsTrainer(model=adapted(), args=args, train_dataset=as_dataset(inputs))
    trainer.train()
    rows = [entry["rows"] for entry in trainer.state.log_history if "rows" in entry]
    taken = torch.tensor([0, *rows]).diff().tolist()
    assert taken[:primed] == [8] * primed
    assert taken[primed:] == [32] * (steps - primed)


def test_a_solved_head_lowers_the_loss_that_noise_would_take_long_to(tmp_path):
    losses = {}
    inputs = tiny_batch("bert", samples=16)
    for head in ("solve", "gradient", "none"):
        args = FlopsTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=8,
            queries_per_sample=4,
            closed_form_head=head,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            optim="sgd",
            learning_rate=1e-2,
        )
        trainer = FlopsTrainer(model=adapted(), args=args, train_dataset=as_dataset(inputs))
        trainer.train()
        losses[head] = [e["loss"] for e in trainer.state.log_history if "loss" in e][-1]
        classifier = trainer.model.get_submodule("base_model.model.classifier.modules_to_save")
        used = {p.grad is not None for p in classifier.parameters()}
        assert used == {False} or head != "solve"
    assert losses["solve"] < 0.85 * min(losses["gradient"], losses["none"])


@pytest.mark.parametrize(("width", "classes", "wanted"), [(768, 100, True), (768, 1000, False)])
def test_a_head_with_too_many_logits_for_what_can_be_kept_is_not_solved(width, classes, wanted):
    head = ClosedFormHead(nn.Linear(width, classes, device="meta"), {"weight": "head.weight"})
    losses = RowLosses(torch.ones(1), torch.ones(1), targets=torch.zeros(1, classes))
    assert HeadSolver.solves(head, losses) == wanted
    assert not HeadSolver.solves(head, RowLosses(torch.ones(1), torch.ones(1)))
