"""Projections that are solved: the solution has no gradient but the prior's, nothing is lost on
the way, and a run begins with clean rows.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_flops import ContrastiveLoss, FlopsTrainer
from hf_flops.contrastive import projection_loss, projection_solver
from hf_flops.contrastive.projection_loss import Group, ProjectionLoss
from hf_flops.contrastive.projection_solver import ProjectionSolver
from hf_flops.estimators import ClosedFormHead, feature_solver
from tests.contrastive.test_contrastive import adapted, arguments
from tests.helpers.pairs import as_pairs, collate, pair_batch
from tests.helpers.tiny import generator

PAIRS, BATCHES, WIDTHS, DIMENSION = 6, 5, {"image": 5, "text": 4}, 8
SCALE, BIAS = 4.0, -0.5


def layers(bias=False):
    made = {side: nn.Linear(width, DIMENSION, bias=bias) for side, width in WIDTHS.items()}
    for index, layer in enumerate(made.values()):
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator(index))
    return made


def heads(made):
    return {
        side: ClosedFormHead(layer, {own: f"{side}.{own}" for own, _ in layer.named_parameters()})
        for side, layer in made.items()
    }


def inputs_of(batch, texts=PAIRS):
    """Texts, and images that are almost a linear function of theirs."""
    text = torch.randn(texts, WIDTHS["text"], generator=generator(batch))
    own = text[torch.arange(PAIRS) % texts]
    image = own @ torch.randn(WIDTHS["text"], WIDTHS["image"], generator=generator(50))
    noise = torch.randn(image.shape, generator=generator(60 + batch))
    return {"image": image + 0.2 * noise, "text": text}


def terms_of(kind):
    loss = ContrastiveLoss(kind)
    return lambda texts, images, labels, given: loss.terms(
        texts, images, labels, sigmoid=False, given=given
    )


def solver_of(made, kind="softmax", batches=BATCHES, labels=None, texts=PAIRS, ids=True):
    solver = ProjectionSolver(terms_of(kind))
    solver.bind(heads(made), SCALE, BIAS)
    own = torch.arange(PAIRS) if labels is None else labels
    for batch in range(batches):
        numbers = range(PAIRS * batch, PAIRS * (batch + 1)) if ids else None
        solver.add(inputs_of(batch, texts), own, numbers, given=labels is not None)
    return solver


def mean_loss(kind, made, labels=None, texts=PAIRS):
    """The mean of the batches' losses, by autograd's means."""
    losses, given = [], {} if labels is None else {"labels": labels}
    for batch in range(BATCHES):
        inputs = inputs_of(batch, texts)
        embeddings = {side: layer(inputs[side]) for side, layer in made.items()}
        outputs = type(
            "Outputs",
            (),
            {"image_embeds": embeddings["image"], "text_embeds": embeddings["text"]},
        )
        scale, bias = torch.tensor(SCALE).log(), torch.tensor(BIAS)
        losses.append(ContrastiveLoss(kind).loss(outputs, given, scale, bias))
    return torch.stack(losses).mean()


CASES = [("softmax", None, PAIRS), ("sigmoid", None, PAIRS), ("softmax", "labels", 3)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "labels", "texts"), CASES)
def test_the_solution_has_no_gradient_but_the_priors(kind, labels, texts, bias, monkeypatch):
    monkeypatch.setattr(projection_loss, "PRIOR", 0.3)
    monkeypatch.setattr(feature_solver, "KEPT", 1.0)
    monkeypatch.setattr(feature_solver, "ITERATIONS", 300)
    labels = None if labels is None else torch.arange(PAIRS) % texts
    made = layers(bias)
    start = {side: head.weights() for side, head in heads(made).items()}
    before = float(mean_loss(kind, made, labels, texts).detach())
    solver = solver_of(made, kind, labels=labels, texts=texts)
    for _ in range(3):
        solver.solve()
    loss = mean_loss(kind, made, labels, texts)
    assert solver.objective == pytest.approx(float(loss.detach()), rel=1e-5)
    assert solver.objective < 0.9 * before
    loss.backward()
    for side, layer in made.items():
        x = torch.cat([inputs_of(batch, texts)[side] for batch in range(BATCHES)]).double()
        x = torch.cat([x, torch.ones(len(x), 1)], 1) if bias else x
        length = (x @ start[side].T).square().sum()
        precision = 0.3 * SCALE**2 * x.square().sum() / length / (PAIRS * BATCHES)
        moved = precision * (heads(made)[side].weights() - start[side])
        found = torch.cat([p.grad.view(DIMENSION, -1) for p in layer.parameters()], 1)
        assert moved.norm() > 1e-3
        assert (found + moved).norm() < 1e-2 * moved.norm()


def test_the_gradient_is_that_of_autograd():
    made = layers()
    head = heads(made)
    groups = []
    for texts in (PAIRS, 4):
        term = ContrastiveLoss().terms(
            texts, PAIRS, torch.arange(PAIRS) % texts, sigmoid=False, given=False
        )
        inputs = {side: part[None].double() for side, part in inputs_of(texts, texts).items()}
        groups.append(Group(projection_solver.stacked([term]), inputs))
    prior = {side: one.weights() for side, one in head.items()}
    loss = ProjectionLoss(head, prior, groups, SCALE, BIAS)
    vector = torch.randn(sum(p.numel() for p in prior.values()), generator=generator(7)).double()
    vector.requires_grad_()

    def objective(vector):
        weights, total = loss.weights(vector), vector.square().sum() / 2
        for group in groups:
            units = {
                side: F.normalize(part @ weights[side].T, dim=-1)
                for side, part in group.inputs.items()
            }
            logits = SCALE * units["text"] @ units["image"].mT + BIAS
            total = total + group.terms.elements(logits).sum()
        return total

    wanted = objective(vector)
    (slopes,) = torch.autograd.grad(wanted, vector)
    found, gradient = loss.evaluate(vector.detach())
    torch.testing.assert_close(found, wanted.detach())
    torch.testing.assert_close(gradient, slopes)
    torch.testing.assert_close(loss.vector(loss.weights(vector.detach())), vector.detach())


def test_a_tower_without_a_projection_stays():
    made = layers()
    solver = ProjectionSolver(terms_of("auto"))
    solver.bind({"image": heads(made)["image"]}, SCALE)
    embeddings = made["text"](inputs_of(0)["text"]).detach()
    solver.add({"image": inputs_of(0)["image"], "text": embeddings}, torch.arange(PAIRS))
    before = made["text"].weight.detach().clone()

    def loss():
        outputs = type("Outputs", (), {})
        outputs.image_embeds = made["image"](inputs_of(0)["image"]).detach()
        outputs.text_embeds = embeddings
        return float(ContrastiveLoss("softmax").loss(outputs, {}, torch.tensor(SCALE).log()))

    start = loss()
    for _ in range(5):
        solver.solve()
    assert solver.objective == pytest.approx(loss(), rel=1e-5)
    assert loss() < 0.8 * start
    assert torch.equal(made["text"].weight, before)


def test_a_sample_counts_in_its_last_batch_and_old_batches_go(monkeypatch):
    solver = solver_of(layers(), batches=2)
    assert solver.samples == 2 * PAIRS
    half = PAIRS // 2
    ids = [*range(half), *range(100, 100 + PAIRS - half)]  # half of the first batch, and new ones
    solver.add(inputs_of(7), torch.arange(PAIRS), ids)
    assert solver.samples == 2 * PAIRS + PAIRS - half
    newest = [solver._newest(batch).tolist() for batch in solver._batches]
    assert newest == [[False] * half + [True] * (PAIRS - half), [True] * PAIRS, [True] * PAIRS]
    solver.add(inputs_of(8), torch.arange(PAIRS), range(PAIRS))
    assert [batch.number for batch in solver._batches] == [PAIRS, 2 * PAIRS, 3 * PAIRS]
    numbers = PAIRS * sum(WIDTHS.values())
    monkeypatch.setattr(projection_solver, "MOST_NUMBERS", 2 * numbers)
    solver.add(inputs_of(9), torch.arange(PAIRS), range(200, 200 + PAIRS))
    assert [batch.number for batch in solver._batches] == [3 * PAIRS, 4 * PAIRS]
    assert solver.samples == 2 * PAIRS


def test_a_batch_that_is_not_finite_is_left_out():
    made = layers()
    solver = solver_of(made, batches=1)
    spoilt = inputs_of(1)
    spoilt["image"][2, 1] = torch.nan
    solver.add(spoilt, torch.arange(PAIRS))
    assert solver.samples == PAIRS
    solver.solve()
    assert made["image"].weight.isfinite().all()


@pytest.mark.parametrize("ids", [True, False])
def test_a_state_restores_everything(ids):
    made = layers()
    solver = solver_of(made, ids=ids)
    solver.add(inputs_of(8), torch.arange(PAIRS) % 3, range(4, 4 + PAIRS), given=True)
    solver.finish_step(epoch=0.5)
    before = {side: layer.weight.detach().clone() for side, layer in made.items()}
    again = ProjectionSolver(solver.terms)
    again.load_state_dict(solver.state_dict())
    again.bind(heads(made), SCALE, BIAS)
    found = []
    for one in (solver, again):
        for side, layer in made.items():
            layer.weight.data.copy_(before[side])
        one.add(inputs_of(9), torch.arange(PAIRS))
        one.finish_step(epoch=0.6)
        found.append({side: layer.weight.detach().clone() for side, layer in made.items()})
        assert not torch.equal(found[-1]["image"], before["image"])
    assert all(torch.equal(found[0][side], found[1][side]) for side in made)
    assert solver.objective == again.objective
    assert solver.primes(0, 100) == again.primes(0, 100)


def test_a_run_is_resumed_in_the_middle_of_priming_and_keeps_all_micro_batches(tmp_path):
    data = [{**row, "sample_id": torch.tensor(i)} for i, row in enumerate(as_pairs(pair_batch(24)))]

    def train(folder, **resume):
        args = arguments(folder, max_steps=20, gradient_accumulation_steps=2)
        args.save_strategy, args.save_steps, args.logging_steps = "steps", 1, 1
        trainer = FlopsTrainer(
            model=adapted("clip"), args=args, train_dataset=data, data_collator=collate
        )
        trainer.train(**resume)
        return trainer

    whole = train(tmp_path / "a")
    assert whole.session.solver.samples == 24
    rows = [entry["rows"] for entry in whole.state.log_history if "rows" in entry]
    taken = torch.tensor([0, *rows]).diff().tolist()
    assert taken[:2] == [16, 16]  # two micro-batches of four images and four texts
    assert min(taken[2:]) > 32
    resumed = train(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert resumed.ledger.rows == whole.ledger.rows
    parts = (dict(trainer.model.named_parameters()) for trainer in (whole, resumed))
    for one, other in zip(*(part.values() for part in parts), strict=True):
        assert torch.equal(one, other)


def test_solved_projections_lower_the_loss_that_steps_would_take_long_to(tmp_path):
    losses, data = {}, as_pairs(pair_batch(16))
    for head in ("solve", "gradient", "none"):
        args = arguments(
            tmp_path, max_steps=8, closed_form_head=head, per_device_train_batch_size=8
        )
        args.logging_steps = 1
        trainer = FlopsTrainer(
            model=adapted("clip"), args=args, train_dataset=data, data_collator=collate
        )
        trainer.train()
        losses[head] = [e["loss"] for e in trainer.state.log_history if "loss" in e][-1]
        solved = [e for e in trainer.state.log_history if "solved_head_loss" in e]
        assert bool(solved) == (head == "solve")
    assert losses["solve"] < 0.85 * min(losses["gradient"], losses["none"])
