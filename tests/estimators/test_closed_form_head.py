"""The closed-form head: exact where it is found, and not found where it would be wrong."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from hf_flops import BatchPosition, FlopsTrainer, FlopsTrainingArguments, Method, estimate_gradient
from hf_flops.allocators import Optimal
from hf_flops.core.chunking import ChunkPlanner
from hf_flops.estimators import Antithetic, OneSided, find_head
from hf_flops.objectives import BatchLoss, CallableObjective, TappedLoss
from hf_flops.objectives.elementwise import slopes
from hf_flops.perturbations import ParameterVector, perturb
from tests.helpers.tiny import as_dataset, generator, model_forward, tiny_batch, tiny_model

CLASSES = 4


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


TARGETS = torch.tensor([0, 3, -100, 1, 2])
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.1], dtype=torch.float64)
SOFT = draws(5, CLASSES, seed=1).softmax(1)
CASES = {
    "cross_entropy": (F.cross_entropy, {"target": TARGETS}),
    "ignored": (F.cross_entropy, {"target": TARGETS.clamp(min=0), "ignore_index": 3}),
    "weights": (F.cross_entropy, {"target": TARGETS, "weight": WEIGHT}),
    "smoothing": (F.cross_entropy, {"target": TARGETS, "weight": WEIGHT, "label_smoothing": 0.3}),
    "soft": (F.cross_entropy, {"target": SOFT, "weight": WEIGHT, "label_smoothing": 0.3}),
    "nll": (F.nll_loss, {"target": TARGETS, "weight": WEIGHT}),
    "mse": (F.mse_loss, {"target": SOFT}),
    "bce": (
        F.binary_cross_entropy_with_logits,
        {"target": SOFT, "weight": WEIGHT, "pos_weight": WEIGHT.flip(0)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_slopes_are_autograds(name):
    function, given = CASES[name]
    logits = draws(5, CLASSES).requires_grad_()
    function(logits, **given, reduction="none").sum().backward()
    assert torch.allclose(
        slopes(function.__name__, {**given, "input": logits.detach()}), logits.grad
    )


def test_slopes_with_positions_behind_the_classes():
    logits, target = (
        draws(5, CLASSES, 3).requires_grad_(),
        torch.tensor([[0, 1, -100]]).expand(5, 3),
    )
    F.cross_entropy(logits, target, reduction="none").sum().backward()
    assert torch.allclose(
        slopes("cross_entropy", {"input": logits.detach(), "target": target}), logits.grad
    )


def adapted(kind="bert", **options):
    names = {"bert": ["query", "value"], "vit": ["q_proj", "v_proj"]}[kind]
    config = LoraConfig(
        r=2, target_modules=names, modules_to_save=["classifier"], init_lora_weights=False
    )
    return get_peft_model(tiny_model(kind, **options), config).eval()


def found(model, inputs, objective=None, **options):
    with torch.no_grad():
        return find_head(model, objective or TappedLoss(), model_forward(model), inputs, **options)


def estimate(model, inputs, forward=None, **options):
    """Estimate with a closed-form head; returns it."""
    head = found(model, inputs)
    others = set(ParameterVector.of(model).names) - set(head.vector.names)
    defaults = {
        "objective": TappedLoss(logits=True),
        "perturbation": perturb(model, rowwise=sorted(others)),
        "estimator": OneSided(),
        "allocator": Optimal(),
        "queries_per_sample": 4,
        "scale": 1e-3,
        "rows_per_forward": 64,
        "head": head,
    }
    model.zero_grad()
    estimate_gradient(
        forward or model_forward(model), inputs, Method(**{**defaults, **options}), BatchPosition()
    )
    return head


def autograd(model, inputs, vector):
    """Return the gradients of the model's loss."""
    return [g.clone() for g in torch.autograd.grad(model(**inputs).loss, vector.parameters)]


@pytest.mark.parametrize("kind", ["bert", "vit"])
@pytest.mark.parametrize("options", [{}, {"estimator": Antithetic()}, {"rows_per_forward": 3}])
def test_the_heads_gradient_is_exact(kind, options):
    model, inputs = adapted(kind), tiny_batch(kind)
    head = estimate(model, inputs, **options)
    assert sorted(head.names) == ["bias", "weight"]
    wanted = autograd(model, inputs, head.vector)
    for parameter, gradient in zip(head.vector.parameters, wanted, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_clean_forward_that_does_not_fit_is_halved_with_the_same_result():
    model, inputs = adapted(), tiny_batch("bert", samples=6)

    def small(batch):
        if len(batch["labels"]) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return model_forward(model)(batch)

    head = estimate(model, inputs, forward=small, rows_per_forward=ChunkPlanner(8))
    wanted = autograd(model, inputs, head.vector)
    assert all(
        torch.allclose(p.grad, g, atol=1e-6)
        for p, g in zip(head.vector.parameters, wanted, strict=True)
    )


def test_a_sample_without_a_finite_loss_leaves_the_average():
    model, inputs = adapted("vit"), tiny_batch("vit")
    rest = {name: value[1:] for name, value in inputs.items()}
    broken = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    broken["pixel_values"][0] = float("nan")
    head, options = found(model, inputs), {"queries_per_sample": 3}
    others = sorted(set(ParameterVector.of(model).names) - set(head.vector.names))
    method = Method(
        TappedLoss(logits=True),
        perturb(model, rowwise=others),
        OneSided(),
        Optimal(),
        scale=1e-3,
        rows_per_forward=64,
        head=head,
        **options,
    )
    estimate_gradient(model_forward(model), broken, method, BatchPosition())
    wanted = autograd(model, rest, head.vector)
    assert all(
        torch.allclose(p.grad, g, atol=1e-6)
        for p, g in zip(head.vector.parameters, wanted, strict=True)
    )


class Scaled(nn.Module):
    """A model whose logits are not what its last linear layer returns."""

    def __init__(self, scale):
        super().__init__()
        self.body, self.head, self.scale = nn.Linear(3, 3), nn.Linear(3, CLASSES), scale

    def forward(self, x, labels):
        logits = self.scale * self.head(self.body(x).tanh())
        return type("Output", (), {"loss": F.cross_entropy(logits, labels), "logits": logits})


class Twice(Scaled):
    """A model whose head takes part in making its own input."""

    def forward(self, x, labels):
        x = self.body(x).tanh()
        return super().forward(x + self.head.weight.sum(0), labels)


def batch():
    return {"x": draws(4, 3).float(), "labels": torch.tensor([0, 1, 2, 3])}


def test_no_head_where_it_would_be_wrong():
    assert found(Scaled(1.0), batch()).vector.names == ["head.weight", "head.bias"]
    assert found(Scaled(2.0), batch()) is None  # something happens to the logits
    assert found(Twice(1.0), batch()) is None  # its own parameters reach its input
    model = Scaled(1.0)
    assert found(model, batch(), objective=BatchLoss()) is None
    assert (
        found(
            model,
            batch(),
            objective=CallableObjective(lambda outputs, inputs: outputs.logits[:, 0]),
        )
        is None
    )
    assert found(model, batch(), frozen={"head.weight"}) is None
    model.body.requires_grad_(False)
    assert found(model, batch()) is None  # nothing is left for noise
    tied = tiny_model("gpt2")
    assert found(tied, tiny_batch("gpt2")) is None  # the head's weight makes embeddings too


class Tasks(nn.Module):
    """A model with a head for each of two tasks, of which a batch has one."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = (
            nn.Linear(3, 3).requires_grad_(False),
            nn.ModuleList([nn.Linear(3, CLASSES) for _ in range(2)]),
        )

    def forward(self, x, task, labels=None):
        logits = self.heads[int(task[0])](self.body(x).tanh())
        return ModelOutput(loss=F.cross_entropy(logits, labels), logits=logits)


def test_a_head_beside_which_nothing_matters_gets_noise(tmp_path):
    model, inputs = Tasks(), {**batch(), "task": torch.ones(4, dtype=torch.int64)}
    assert found(model, inputs).module is model.heads[1]
    before = [head.weight.clone() for head in model.heads]
    args = FlopsTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to="none", save_strategy="no"
    )
    trainer = FlopsTrainer(model=model, args=args, train_dataset=as_dataset(inputs))
    trainer.train()
    assert trainer.session.chosen.head is None
    assert [head.weight.equal(old) for head, old in zip(model.heads, before, strict=True)] == [
        True,
        False,
    ]


def test_the_trainer_leaves_the_noise_to_the_adapter(tmp_path):
    inputs = tiny_batch("bert", samples=8)
    model, gradients = adapted(), {}
    for on in (True, False):
        args = FlopsTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=8,
            closed_form_head="gradient" if on else "none",
            report_to="none",
            save_strategy="no",
            learning_rate=0.0,
            max_grad_norm=0.0,
        )
        trainer = FlopsTrainer(model=model, args=args, train_dataset=as_dataset(inputs))
        seen = {}
        trainer.create_optimizer()
        trainer.optimizer.register_step_pre_hook(
            lambda *_, seen=seen: seen.update(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )
        )
        trainer.train()
        gradients[on] = seen
        assert (
            any("classifier" in name for name in trainer.session.chosen.perturbation.vector.names)
            != on
        )
    model.zero_grad()
    classifiers = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "classifier" in name:
            wanted, classifiers = (
                torch.autograd.grad(model(**inputs).loss, parameter)[0],
                classifiers + 1,
            )
            assert torch.allclose(gradients[True][name], wanted, atol=1e-5)
            assert not torch.allclose(gradients[False][name], wanted, atol=1e-3)
    assert classifiers == 2
