from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from hf_flops import CallableObjective, ObjectiveError
from hf_flops.autotune.row_loss_check import choose_objective
from hf_flops.objectives import BatchLoss, TappedLoss
from tests.helpers.tiny import (
    CLASSES,
    SIZES,
    TASKS,
    VOCABULARY,
    generator,
    model_forward,
    tiny_batch,
    tiny_model,
)


def bert(head, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return head(
            BertConfig(vocab_size=VOCABULARY, **{"num_labels": CLASSES, **SIZES, **options})
        ).eval()


def token_batch():
    batch = tiny_batch("bert")
    labels = torch.randint(CLASSES, batch["input_ids"].shape, generator=generator(1))
    return {**batch, "labels": torch.where(batch["attention_mask"].bool(), labels, -100)}


CASES = {
    **{kind: (tiny_model(kind), tiny_batch(kind)) for kind in TASKS},
    "multi_label": (
        bert(BertForSequenceClassification, problem_type="multi_label_classification"),
        {
            **tiny_batch("bert"),
            "labels": torch.randint(2, (4, CLASSES), generator=generator()).float(),
        },
    ),
    "regression": (
        bert(BertForSequenceClassification, problem_type="regression"),
        {**tiny_batch("bert"), "labels": torch.randn(4, CLASSES, generator=generator())},
    ),
    "tokens": (bert(BertForTokenClassification), token_batch()),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_tap_takes_the_models_loss_apart(case):
    model, inputs = CASES[case]
    losses = TappedLoss()(model_forward(model), inputs)
    assert losses.sums.shape == losses.counts.shape == (4,)
    torch.testing.assert_close(losses.sums.sum() / losses.counts.sum(), model(**inputs).loss)
    for row in range(4):  # each row alone has the loss that the tap gave it
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        torch.testing.assert_close(
            losses.sums[row] / losses.counts[row], model(**alone).loss, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("case", CASES)
def test_residuals_are_the_norms_of_the_derivative_by_the_outputs(case):
    model, inputs = CASES[case]
    caught = []

    def forward(batch):
        outputs = model(**batch)
        caught.append(outputs.logits.detach().requires_grad_())
        with torch.enable_grad():
            return loss_of(caught[0], batch["labels"]), outputs

    def loss_of(logits, labels):
        if case in ("llama", "gpt2", "opt"):
            logits, labels = logits[:, :-1], labels[:, 1:]
        if case == "multi_label":
            return F.binary_cross_entropy_with_logits(logits, labels)
        if case == "regression":
            return F.mse_loss(logits, labels)
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    found = TappedLoss()(lambda batch: (model(**batch).loss, None), inputs, features=True)
    loss, _ = forward(inputs)
    (gradient,) = torch.autograd.grad(loss * found.counts.sum(), caught)
    torch.testing.assert_close(
        found.residuals, gradient.flatten(1).norm(dim=1), rtol=1e-3, atol=1e-4
    )


def test_class_weights_and_ignored_labels_count_as_in_torch():
    logits, weight = torch.randn(6, 3, generator=generator()), torch.tensor([0.2, 1.0, 3.0])
    labels = torch.tensor([0, 1, 2, -100, 2, 0])

    def forward(inputs):
        return F.cross_entropy(logits, inputs["labels"], weight=weight), None

    losses = TappedLoss()(forward, {"labels": labels})
    torch.testing.assert_close(
        losses.sums.sum() / losses.counts.sum(), forward({"labels": labels})[0]
    )
    assert losses.counts[3] == 0
    torch.testing.assert_close(losses.counts[2], torch.tensor(3.0))


def test_a_loss_module_and_every_reduction_are_seen():
    logits, labels = torch.randn(4, 3, generator=generator()), torch.tensor([0, 1, 2, 0])
    each = F.cross_entropy(logits, labels, reduction="none")
    for reduction, total in (("mean", each.mean()), ("sum", each.sum()), ("none", each)):
        loss = nn.CrossEntropyLoss(reduction=reduction)
        seen = []
        reducible = {"mean": lambda v: v, "sum": lambda v: v / 4, "none": lambda v: v.mean()}[
            reduction
        ]

        def forward(inputs, loss=loss, seen=seen, reducible=reducible):
            seen.append(loss(logits, inputs["labels"]))
            return reducible(seen[0]), None

        torch.testing.assert_close(TappedLoss()(forward, {"labels": labels}).sums, each)
        torch.testing.assert_close(seen[0], total)


def test_weights_of_a_squared_error_count_as_in_torch():
    x, y, weight = torch.rand(3, 4, 2, generator=generator())

    def forward(inputs):
        return F.mse_loss(x, inputs["labels"], weight=weight), None

    losses = TappedLoss()(forward, {"labels": y})
    torch.testing.assert_close(losses.sums.sum() / losses.counts.sum(), forward({"labels": y})[0])
    torch.testing.assert_close(losses.counts, weight.sum(1))


@pytest.mark.parametrize(
    "legacy", [{"size_average": False}, {"reduce": False}, {"size_average": True}]
)
def test_arguments_from_before_reduction_are_followed(legacy):
    logits, labels, seen = torch.randn(4, 3, generator=generator()), torch.tensor([0, 1, 2, 0]), []

    def forward(inputs):
        seen.append(F.cross_entropy(logits, inputs["labels"], **legacy))
        return seen[-1].mean() / (len(labels) if legacy == {"size_average": False} else 1), None

    for run in (forward, partial(TappedLoss(), forward)):
        with pytest.warns(UserWarning, match="size_average and reduce"):
            run({"labels": labels})
    torch.testing.assert_close(seen[1], seen[0])


@torch.no_grad()
def test_losses_that_are_not_per_row_fall_back_to_the_batch():
    batch = tiny_batch("bert")
    positions = {
        "start_positions": torch.tensor([0, 1, 2, 3]),
        "end_positions": torch.tensor([1, 2, 3, 4]),
    }
    questions = {**{k: v for k, v in batch.items() if k != "labels"}, **positions}
    objective, reason = choose_objective(
        model_forward(bert(BertForQuestionAnswering, num_labels=2)), questions
    )
    assert isinstance(objective, BatchLoss)
    assert "2 calls" in reason

    model = bert(BertForSequenceClassification)

    def auxiliary(inputs):
        outputs = model(**inputs)
        return outputs.loss + 0.01 * outputs.logits.square().mean(), outputs

    objective, reason = choose_objective(auxiliary, batch)
    assert isinstance(objective, BatchLoss)
    assert "is not the mean" in reason


@torch.no_grad()
def test_rows_that_see_each_other_fall_back_to_the_batch():
    def contrastive(inputs):
        similarity = inputs["features"] @ inputs["features"].T
        return F.cross_entropy(similarity, torch.arange(len(similarity))), None

    inputs = {"features": torch.randn(4, 5, generator=generator()), "labels": torch.arange(4)}
    objective, reason = choose_objective(contrastive, inputs)
    assert isinstance(objective, BatchLoss)
    assert "depends on the other samples" in reason


@torch.no_grad()
def test_a_users_function_of_the_outputs_is_an_objective():
    model, inputs = CASES["vit"]
    objective = CallableObjective(
        lambda outputs, batch: (outputs.logits.argmax(-1) != batch["labels"]).float()
    )
    losses = objective(lambda batch: (None, model(**batch)), inputs)
    assert losses.sums.shape == (4,)
    assert losses.counts.tolist() == [1, 1, 1, 1]
    with pytest.raises(ObjectiveError, match=r"losses of shape \(\) for 4 rows"):
        CallableObjective(lambda outputs, batch: outputs.logits.mean())(
            lambda batch: (None, model(**batch)), inputs
        )


class Two(nn.Module):
    """Classifies with a backbone and a head; where it is told so with the backbone alone."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head, self.alone = nn.Linear(4, 3), nn.Linear(3, 3), False

    def forward(self, x, labels):
        hidden = self.backbone(x)
        logits = hidden if self.alone else self.head(hidden)
        return F.cross_entropy(logits, labels), logits


def test_the_tap_listens_after_the_last_module_before_the_loss():
    torch.manual_seed(0)
    model, seen = Two(), []
    inputs = {"x": torch.randn(5, 4), "labels": torch.tensor([0, 1, 2, 0, 1])}

    def forward(given):
        return model(**given)

    def function_modes(*args):
        seen.append(len(torch.overrides._get_current_function_mode_stack()))

    early, late = TappedLoss(), TappedLoss()
    late.listen_late(model, forward, inputs)
    assert late.after is model.head
    model.backbone.register_forward_hook(function_modes)
    torch.testing.assert_close(
        late(forward, inputs).sums, early(forward, inputs).sums, rtol=0, atol=0
    )
    assert seen == [0, 1]
    assert not model.head._forward_hooks
    model.alone = True  # what it listened for does not come
    torch.testing.assert_close(
        late(forward, inputs).sums, early(forward, inputs).sums, rtol=0, atol=0
    )
    assert late.after is None


def test_a_tap_leaves_nothing_behind_where_a_forward_raises():
    model = Two()
    late = TappedLoss()
    inputs = {"x": torch.randn(5, 4), "labels": torch.tensor([0, 1, 2, 0, 1])}
    late.listen_late(model, lambda given: model(**given), inputs)
    with pytest.raises(IndexError):
        late(lambda given: model(**given), {**inputs, "labels": inputs["labels"] + 7})
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.mark.parametrize(
    ("kind", "last"), [("vit", "classifier"), ("bert", "classifier"), ("llama", "lm_head")]
)
def test_of_real_models_the_last_module_is_the_head(kind, last):
    model, tap = tiny_model(kind), TappedLoss()
    tap.listen_late(model, model_forward(model), tiny_batch(kind, 2))
    assert tap.after is model.get_submodule(last)
