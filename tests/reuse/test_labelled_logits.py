"""Logits only where there are labels: the same losses and estimates, from fewer columns of the
head.
"""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from hf_flops import (
    BatchPosition,
    CallableObjective,
    FlopsTrainer,
    FlopsTrainingArguments,
    Method,
    estimate_gradient,
)
from hf_flops.allocators import ALLOCATORS
from hf_flops.autotune.epsilon import calibrate
from hf_flops.base.batch import take
from hf_flops.estimators import ESTIMATORS
from hf_flops.objectives import BatchLoss, TappedLoss
from hf_flops.perturbations import ParameterVector, perturb
from hf_flops.reuse import LastLogits, choose_reuse, with_last_logits
from tests.helpers.tiny import (
    TOKENS,
    VOCABULARY,
    as_dataset,
    generator,
    model_forward,
    tiny_batch,
    tiny_model,
)

ADAPTERS = {
    "lora": LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "last": LoraConfig(
        r=2, target_modules=["q_proj"], layers_to_transform=[1], task_type="CAUSAL_LM"
    ),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def adapted(adapter="lora", **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model("llama", **options), ADAPTERS[adapter]).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def answers(firsts, lengths=None, left=False, seed=0):
    """Draw texts of which row i has labels from column `firsts[i]` on, and as many tokens as
    `lengths` says.
    """
    ids = torch.randint(3, VOCABULARY, (len(firsts), TOKENS), generator=generator(seed))
    columns = torch.arange(TOKENS)
    ends = torch.tensor(lengths or [TOKENS] * len(firsts))[:, None]
    mask = (columns >= TOKENS - ends) if left else (columns < ends)
    labels = torch.where(mask & (columns >= torch.tensor(firsts)[:, None]), ids, -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


@contextmanager
def columns_of_the_head(model):
    """Collect how many columns the head sees."""
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: seen.append(out.shape[1])
    )
    yield seen
    handle.remove()


@torch.no_grad()
def shortened(model, inputs):
    found = with_last_logits(model, TappedLoss(), model_forward(model), inputs)
    assert isinstance(found, LastLogits)
    return found


@settings(max_examples=25)
@given(
    adapter=st.sampled_from(list(ADAPTERS)),
    firsts=st.lists(st.integers(0, TOKENS - 1), min_size=1, max_size=4),
    left=st.booleans(),
    data=st.data(),
)
@torch.no_grad()
def test_losses_counts_and_residuals_are_the_same(adapter, firsts, left, data):
    lengths = data.draw(
        st.lists(st.integers(1, TOKENS), min_size=len(firsts), max_size=len(firsts))
    )
    model = adapted(adapter)
    forward, inputs = model_forward(model), answers(firsts, lengths, left)
    objective, counted = LastLogits(model.get_base_model()), inputs["labels"][:, 1:] != -100
    wanted = TappedLoss()(forward, inputs, features=True)
    with columns_of_the_head(model) as columns:
        found = objective(forward, inputs, features=True)
    for name in ("sums", "counts", "residuals"):
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-5, equal_nan=True
        )
    if counted.any():
        virtual = 3 * (adapter == "prompt")
        labelled = torch.nonzero((inputs["labels"] != -100).any(0)).flatten() + virtual
        assert columns == [int(labelled[-1]) - max(0, int(labelled[0]) - 1) + 1]


@pytest.mark.parametrize("estimator", ["one_sided", "antithetic"])
@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_estimates_are_the_same_with_late_expansion_and_cut_padding(adapter, estimator):
    model, inputs = adapted(adapter).double(), answers([3, 5, 4, 2], [5, 7, 6, 4])
    forward, objective = model_forward(model), shortened(model, inputs)
    perturbation = perturb(model, rowwise=ParameterVector.of(model).names)
    parts = (perturbation, ESTIMATORS[estimator](), ALLOCATORS["optimal"]())
    method = Method(TappedLoss(), *parts, 6, 0.05, 5, frozenset(["right"]))
    with torch.no_grad():
        reuse, reason = choose_reuse(model, objective, forward, inputs, perturbation)
    assert reason is None
    found = []
    for own in (
        method,
        replace(method, objective=objective),
        replace(method, objective=objective, reuse=reuse),
    ):
        model.zero_grad()
        result = estimate_gradient(forward, inputs, own, BatchPosition(seed=3), elements=7)
        found.append(
            (result, torch.cat([p.grad.flatten() for p in perturbation.vector.parameters]))
        )
        assert "forward" not in vars(model.get_base_model())
    for result, gradient in found[1:]:
        torch.testing.assert_close(
            gradient, found[0][1], rtol=1e-5, atol=1e-5 * float(found[0][1].abs().max())
        )
        torch.testing.assert_close(result.loss, found[0][0].loss, rtol=1e-5, atol=0)
        assert result.counts.equal(found[0][0].counts)


@pytest.mark.parametrize("estimator", ["one_sided", "antithetic"])
@torch.no_grad()
def test_calibration_is_the_same(estimator):
    # no two steps are nearly equally good
    model, inputs = adapted().double(), answers([3, 5], seed=2)
    method = Method(
        TappedLoss(),
        perturb(model, rowwise=ParameterVector.of(model).names),
        ESTIMATORS[estimator](),
        ALLOCATORS["uniform"](),
        4,
        1e-2,
        8,
    )
    plain = calibrate(model_forward(model), inputs, method)
    found = calibrate(
        model_forward(model), inputs, replace(method, objective=shortened(model, inputs))
    )
    assert found.rows == plain.rows
    assert found.scale == plain.scale is not None


@pytest.mark.parametrize(
    "given", ["logits_to_keep", "shift_labels", "first column", "nothing labelled", "batch loss"]
)
@torch.no_grad()
def test_forwards_that_want_all_logits_run_as_they_are(given):
    model, inputs = adapted(), answers([4, 5])
    objective = shortened(model, inputs)
    if given == "logits_to_keep":
        inputs["logits_to_keep"] = 0
    elif given == "shift_labels":
        inputs["shift_labels"] = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[
            :, 1:
        ].contiguous()
    elif given == "first column":
        inputs["labels"][0, 0] = 5
    elif given == "nothing labelled":
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
    wanted = TappedLoss()(model_forward(model), inputs).sums
    with columns_of_the_head(model) as columns:
        if given == "batch loss":
            BatchLoss()(model_forward(model), inputs)
        else:
            assert objective(model_forward(model), inputs).sums.equal(wanted)
    assert columns == [TOKENS]


@pytest.mark.parametrize("kind", ["t5", "bert", "vit", "llama"])
@torch.no_grad()
def test_other_models_and_other_objectives_are_left_alone(kind):
    model, inputs = tiny_model(kind), tiny_batch(kind)
    objective = (
        CallableObjective(lambda outputs, inputs: outputs.logits.sum((1, 2)))
        if kind == "llama"
        else TappedLoss()
    )
    assert with_last_logits(model, objective, model_forward(model), inputs) is objective


@pytest.mark.parametrize("odd", ["wrong", "refuses"])
@torch.no_grad()
def test_a_model_that_keeps_other_logits_keeps_all(odd):
    model, inputs = tiny_model("llama"), answers([4, 5])
    original = model.forward

    def forward(input_ids=None, labels=None, logits_to_keep=None, **others):
        if odd == "refuses" and logits_to_keep is not None:
            raise ValueError("logits_to_keep is not known here")
        kept = 0 if logits_to_keep is None else logits_to_keep - 1  # off by one
        return original(input_ids=input_ids, labels=labels, logits_to_keep=kept, **others)

    model.forward = forward
    objective = TappedLoss()
    assert with_last_logits(model, objective, model_forward(model), inputs) is objective
    assert model.forward is forward


@torch.no_grad()
def test_nothing_is_left_on_the_model_after_an_exception():
    model, inputs = adapted(), answers([4, 5])
    objective = shortened(model, inputs)

    def fail(inputs):
        assert "forward" in vars(model.get_base_model())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        objective(fail, inputs)
    assert "forward" not in vars(model.get_base_model())


def test_the_trainer_uses_it_and_steps_to_the_same_place(tmp_path):
    weights = []
    for own in (None, TappedLoss()):
        model, inputs = adapted("prompt").double(), answers([4, 5, 6, 3])
        options = {
            "optim": "sgd",  # Adam makes a whole step of the last bit of a gradient near zero
            "queries_per_sample": 4,
            "learning_rate": 0.1,
            "perturbation_scale": 0.1,  # large, so that differences of losses keep their digits
            "max_steps": 2,
            "per_device_train_batch_size": 2,
        }
        options |= {"rows_per_forward": 3, "report_to": [], "use_cpu": True, "save_strategy": "no"}
        args = FlopsTrainingArguments(output_dir=str(tmp_path), **options)
        trainer = FlopsTrainer(model, args, objective=own, train_dataset=as_dataset(inputs))
        with columns_of_the_head(model) as columns:
            trainer.train()
        assert (max(columns[-2:]) < TOKENS) == (own is None)
        weights.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)


@given(samples=st.lists(st.integers(0, 3), min_size=1, max_size=5))
@settings(max_examples=10)
@torch.no_grad()
def test_rows_of_a_chunk_may_begin_their_answers_anywhere(samples):
    model, inputs = adapted(), answers([2, 6, 4, 5])
    rows = take(inputs, torch.tensor(samples))
    found = shortened(model, inputs)(model_forward(model), rows).sums
    torch.testing.assert_close(
        found, TappedLoss()(model_forward(model), rows).sums, rtol=1e-5, atol=1e-5
    )
