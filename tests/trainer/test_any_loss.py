"""Losses of any form have losses of their own for rows, and the gradient of the stock trainer."""

import copy
from functools import partial

import pytest
import torch
from helpers.coordinates import use_coordinates
from torch import nn
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import PretrainedConfig, Trainer, TrainerCallback, TrainingArguments

from hf_flops import FlopsTrainer, FlopsTrainerMixin, FlopsTrainingArguments
from hf_flops.errors import ObjectiveError
from hf_flops.objectives import CoupledLoss, RowwiseLoss, TappedLoss

CLASSES, TOKENS, WIDTH = 3, 6, 2


class Net(nn.Module):
    """Classifies tokens, or their mean, with two layers."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(WIDTH, 2), nn.Linear(2, CLASSES)
        self.config = PretrainedConfig()

    def logits(self, x):
        return self.last(torch.tanh(self.first(x)))

    def forward(self, x):
        return {"logits": self.logits(x)}


class Counting(Net):
    """Takes the stock trainer's count of labels, so that this is computed, and ignores it."""

    def forward(self, x, **options):
        return super().forward(x)


class Classifier(Net):
    def forward(self, x, labels):
        return {"loss": F.cross_entropy(self.logits(x.mean(1)), labels)}


class Ignoring(Net):
    def forward(self, x, labels):
        return {"loss": F.cross_entropy(self.logits(x.mean(1)), labels, ignore_index=255)}


class Selecting(Net):
    """Only looks at tokens that have a label, as ModernBERT's sparse prediction does."""

    def forward(self, x, labels):
        kept = labels >= 0
        return {"loss": F.cross_entropy(self.logits(x)[kept], labels[kept])}


class SelectingFirst(Net):
    def forward(self, x, labels):
        kept = labels >= 0
        return {"loss": F.cross_entropy(self.logits(x[kept]), labels[kept])}


class Gaps(Net):
    def forward(self, x, labels):
        known = labels.isfinite()
        return {"loss": F.mse_loss(self.logits(x)[..., 0][known], labels[known])}


class Masked(Net):
    def forward(self, x, labels):
        known = labels.isfinite()
        errors = F.mse_loss(self.logits(x)[..., 0], labels.nan_to_num(), reduction="none")
        return {"loss": errors[known].mean()}


class Questions(Net):
    """Points at the first and the last token of an answer, as question answering does."""

    def forward(self, x, start, end):
        begins, ends, _ = self.logits(x).unbind(-1)
        return {"loss": (F.cross_entropy(begins, start) + F.cross_entropy(ends, end)) / 2}


class Weighted(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **options):
        logits = model(x=inputs["x"].mean(1))["logits"]
        losses = F.cross_entropy(logits, inputs["labels"], reduction="none")
        return (losses * inputs["weight"]).sum() / inputs["weight"].sum()


class Focal(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **options):
        labels = inputs["labels"]
        kept = labels != -100
        logs = model(x=inputs["x"])["logits"].log_softmax(-1)
        logs = logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return -((1 - logs.exp()) ** 2 * logs)[kept].mean()


class Distilled(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **options):
        self.teacher = self.teacher.to(inputs["x"])
        logits, x = model(x=inputs["x"])["logits"][:, 0], inputs["x"]
        with torch.no_grad():
            wanted = self.teacher(x[:, 0])
        soft = F.kl_div(logits.log_softmax(-1), wanted.softmax(-1), reduction="batchmean")
        return 0.3 * soft + F.cross_entropy(logits, inputs["labels"])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        teacher = nn.Linear(WIDTH, CLASSES)


class Preferring(Trainer):
    """Prefers one text to another, compared with a reference, as DPO does."""

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        margins = []
        for each in (model, self.reference.to(inputs["x"])):
            chosen, rejected = (each(x=inputs[name])["logits"].log_softmax(-1) for name in "xy")
            margins.append(chosen[..., 0].sum(1) - rejected[..., 1].sum(1))
        return -F.logsigmoid(0.5 * (margins[0] - margins[1])).mean()

    reference = Net()
    nn.init.zeros_(reference.last.weight)


class Dividing(Trainer):
    """Divides by the number of labels of the optimizer step, which is never None."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert not return_outputs
        logits = model(x=inputs["x"])["logits"].transpose(1, 2)
        return F.cross_entropy(logits, inputs["labels"], reduction="sum") / num_items_in_batch


class Penalised(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **options):
        logits = model(x=inputs["x"].mean(1))["logits"]
        penalty = sum(p.square().sum() for p in self.model.parameters())
        return F.cross_entropy(logits, inputs["labels"]) + 0.1 * penalty


class Contrasting(Trainer):
    """A loss that is no sum over rows."""

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        x = model(x=inputs["x"].mean(1))["logits"]
        return F.cross_entropy(x @ x.T, torch.arange(len(x)))


class Constant(Trainer):
    """Compares the model with what it says of other inputs, and holds that constant."""

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        with torch.no_grad():
            wanted = model(x=inputs["y"].mean(1))["logits"]
        found = model(x=inputs["x"].mean(1))["logits"]
        return F.mse_loss(found, 1 - wanted)


class Coupled(Trainer):
    """A sum over rows but for a statistic of the batch that is held constant, as KTO's."""

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        with torch.no_grad():
            other = model(x=inputs["y"])["logits"].sum((1, 2))
        shift = other.mean().clamp(min=-100)
        found = model(x=inputs["x"])["logits"].sum((1, 2))
        return 1 - torch.sigmoid(0.5 * (found - shift)).mean()


class Weighing(Trainer):
    """Weighs each row by its own loss, which is held constant."""

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        logits = model(x=inputs["x"].mean(1))["logits"]
        losses = F.cross_entropy(logits, inputs["labels"], reduction="none")
        return ((1 - (-losses).exp()).detach() ** 2 * losses).mean()


class Following(Trainer):
    """Follows what the model says of other inputs, which is held constant."""

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        self.log_values = model(x=inputs["x"].mean(1))["logits"].detach().sum()
        found, wanted = (model(x=inputs[name].mean(1))["logits"] for name in "xy")
        return F.mse_loss(found, 1 - wanted.detach())


def divided(outputs, labels, num_items_in_batch=None):
    logits = outputs["logits"].transpose(1, 2)
    return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def generator():
    return torch.Generator().manual_seed(3)


def xs():
    x = torch.randn(4, TOKENS, WIDTH, generator=generator(), dtype=torch.float64)
    return 2 * x * torch.tensor([1.0, 3.0, 0.5, 2.0])[:, None, None]


def rows(**columns):
    return [{name: column[i] for name, column in columns.items()} for i in range(4)]


def tokens(ignored=-100, lengths=(1, 3, 6, 2)):
    labels = torch.full((4, TOKENS), ignored)
    for row, length in enumerate(lengths):
        labels[row, TOKENS - length :] = (torch.arange(length) + row) % CLASSES
    return labels


def gaps():
    return torch.where(tokens() < 0, torch.nan, tokens().double())


LABELS = torch.tensor([0, 1, 2, 1])
SMOOTH = {"label_smoothing_factor": 0.2}
CASES = {
    "classes": (Classifier, rows(x=xs(), labels=LABELS), Trainer, {}, TappedLoss),
    "ignored class": (
        Ignoring,
        rows(x=xs(), labels=torch.tensor([0, 255, 2, 1], dtype=torch.uint8)),
        Trainer,
        {},
        TappedLoss,
    ),
    "selected tokens": (Selecting, rows(x=xs(), labels=tokens(-1)), Trainer, {}, RowwiseLoss),
    "selected, even": (
        Selecting,
        rows(x=xs(), labels=tokens(-1, (2, 2, 4, 4))),
        Trainer,
        {},
        RowwiseLoss,
    ),
    "selected, alike": (
        Selecting,
        rows(x=xs(), labels=tokens(-1, (2, 2, 2, 2))),
        Trainer,
        {},
        RowwiseLoss,
    ),
    "gaps": (Gaps, rows(x=xs(), labels=gaps()), Trainer, {}, RowwiseLoss),
    "masked": (Masked, rows(x=xs(), labels=gaps()), Trainer, {}, RowwiseLoss),
    "questions": (
        Questions,
        rows(x=xs(), start=LABELS, end=LABELS + 2),
        Trainer,
        {},
        RowwiseLoss,
    ),
    "label smoothing": (Net, rows(x=xs(), labels=tokens()), Trainer, SMOOTH, RowwiseLoss),
    "label smoothing, counted": (
        Counting,
        rows(x=xs(), labels=tokens()),
        Trainer,
        SMOOTH,
        RowwiseLoss,
    ),
    "sample weights": (
        Net,
        rows(x=xs(), labels=LABELS, weight=torch.tensor([0.1, 1.0, 2.0, 0.5])),
        Weighted,
        {},
        RowwiseLoss,
    ),
    "focal": (Net, rows(x=xs(), labels=tokens()), Focal, {}, RowwiseLoss),
    "distillation": (Net, rows(x=xs(), labels=LABELS), Distilled, {}, RowwiseLoss),
    "preferences": (Net, rows(x=xs(), y=xs().flip(0)), Preferring, {}, RowwiseLoss),
    "divided": (Counting, rows(x=xs(), labels=tokens()), Dividing, {}, TappedLoss),
    "compute_loss_func": (
        Net,
        rows(x=xs(), labels=tokens()),
        Trainer,
        {"compute_loss_func": divided},
        TappedLoss,
    ),
    "penalty": (Net, rows(x=xs(), labels=LABELS), Penalised, {}, RowwiseLoss),
    "constant": (Net, rows(x=xs(), y=xs().flip(0)), Constant, {}, CoupledLoss),
    "own weights": (Net, rows(x=xs(), labels=LABELS), Weighing, {}, CoupledLoss),
    "own targets": (Net, rows(x=xs(), y=xs().flip(0)), Following, {}, CoupledLoss),
    "coupled": (Net, rows(x=xs(), y=xs().flip(0)), Coupled, {}, CoupledLoss),
    "contrast": (Net, rows(x=xs()), Contrasting, {}, CoupledLoss),
}


def counted(outputs, inputs):
    """An objective of the user's own that counts tokens."""
    labels = inputs["labels"]
    losses = F.cross_entropy(outputs["logits"].transpose(1, 2), labels, reduction="none")
    return losses.sum(1), (labels != -100).sum(1)


class Gradient(TrainerCallback):
    """Keeps the gradient of the first optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **options):
        self.value = torch.cat([p.grad.flatten().clone() for p in model.parameters()])


def first_step(trainer_class, arguments_class, model, data, folder, micro, options, **own):
    """Return the gradient and the loss of an optimizer step of four samples, and the trainer."""
    names = [name for name in options if name != "compute_loss_func"]
    args = arguments_class(
        str(folder),
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        optim="sgd",
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        remove_unused_columns=False,
        label_names=["labels"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=4 // micro,
        **{name: options[name] for name in names},
        **own,
    )
    given = {name: options[name] for name in options if name not in names}
    trainer = trainer_class(model=model, args=args, train_dataset=data, **given)
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
    gradient = Gradient()
    trainer.add_callback(gradient)
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return gradient.value, loss, trainer


# with these and two rows per entry, a step is a gradient
EXACT = {
    "estimator": "antithetic",
    "allocator": "uniform",
    "control_variate": "none",
    "closed_form_head": False,
    "pictures": False,
}


@pytest.mark.parametrize("micro", [4, 2])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_stock_trainer(name, micro, tmp_path, monkeypatch):
    model_class, data, stock, options, objective = CASES[name]
    model = model_class().double()
    where = data, tmp_path, micro, options
    wanted, loss, _ = first_step(stock, TrainingArguments, copy.deepcopy(model), *where)
    use_coordinates(monkeypatch)
    forward_only = type("ForwardOnly", (FlopsTrainerMixin, stock), {})
    shared = name == "penalty"
    clean = int(objective is CoupledLoss)
    found, found_loss, trainer = first_step(
        forward_only,
        FlopsTrainingArguments,
        model,
        *where,
        queries_per_sample=2 * len(wanted) + clean,
        perturbation="shared" if shared else "rowwise",
        **EXACT,
    )
    assert type(trainer.session.chosen.objective) is objective
    assert_same(found, wanted)
    assert found_loss == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("stock", [Coupled, Weighing])
def test_noise_that_would_move_constants_is_refused(stock, tmp_path):
    forward_only = type("ForwardOnly", (FlopsTrainerMixin, stock), {})
    where = rows(x=xs(), y=xs().flip(0), labels=LABELS), tmp_path, 4, {}
    with pytest.raises(ObjectiveError, match=r"holds values constant .*: pass objective="):
        first_step(
            forward_only, FlopsTrainingArguments, Net().double(), *where, perturbation="shared"
        )


def assert_same(found, wanted):
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.999
    assert float(found.norm() / wanted.norm()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("micro", [4, 2, 1])
@pytest.mark.parametrize("lengths", [(1, 1, 6, 6), (0, 0, 3, 2)])
def test_own_objectives_weigh_batches_by_the_elements_they_count(
    lengths, micro, tmp_path, monkeypatch
):
    labels, model = tokens(lengths=lengths), Counting().double()
    sums, counts = counted(model(xs()), {"labels": labels})
    loss = sums.sum() / counts.sum()
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    use_coordinates(monkeypatch)
    where = rows(x=xs(), labels=labels), tmp_path, micro, {}
    own = {"queries_per_sample": 2 * len(wanted), **EXACT}
    found, found_loss, _ = first_step(
        partial(FlopsTrainer, objective=counted), FlopsTrainingArguments, model, *where, **own
    )
    assert_same(found, wanted)
    assert found_loss == pytest.approx(loss.item(), rel=1e-3)
