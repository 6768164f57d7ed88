"""What cannot work is refused in one clear sentence that names the offending value; what can, goes
on.
"""

import logging
from contextlib import contextmanager

import pytest
import torch
from peft import AdaptionPromptConfig, CartridgeConfig, LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    TrainingArguments,
)

from hf_flops import (
    ConfigurationError,
    FlopsTrainer,
    FlopsTrainingArguments,
    NonFiniteError,
    ObjectiveError,
)
from hf_flops.objectives import RowLossError, RowwiseLoss, TappedLoss
from hf_flops.trajectory.replay import replay
from tests.helpers.tiny import (
    CLASSES,
    SIZES,
    TASKS,
    VOCABULARY,
    as_dataset,
    tiny_batch,
    tiny_model,
    training_arguments,
)

TARGETS = {"vit": ["q_proj", "v_proj"], "bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}


@pytest.fixture
def arguments(tmp_path):
    """Return what builds training arguments that suit tiny models."""

    def build(kind=FlopsTrainingArguments, **options):
        few = {"queries_per_sample": 4} if kind is FlopsTrainingArguments else {}
        return training_arguments(
            tmp_path, kind, **{**few, "max_steps": 2, "logging_steps": 1, **options}
        )

    return build


@pytest.fixture
def notices(caplog):
    """Return what lists the warnings that the library has logged."""
    caplog.set_level(logging.WARNING)
    return lambda: [
        record.getMessage() for record in caplog.records if record.name.startswith("hf_flops")
    ]


@contextmanager
def refused(error, match):
    with pytest.raises(error, match=match) as caught:
        yield
    assert_sentence(str(caught.value))


def assert_sentence(message):
    assert message.endswith(".")
    assert "\n" not in message


def adapted(kind="vit", model=None, config=None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = config or LoraConfig(r=2, target_modules=TARGETS[kind], task_type=TASKS[kind])
        return get_peft_model(tiny_model(kind) if model is None else model(), config)


def data(kind="vit", samples=8):
    return as_dataset(tiny_batch(kind, samples))


def trainer(args, model=None, dataset=None, **options):
    return FlopsTrainer(model or adapted(), args, train_dataset=dataset or data(), **options)


def flat(model):
    return torch.cat(
        [value.detach().flatten() for value in model.parameters() if value.requires_grad]
    )


def assert_trains(candidate):
    before = flat(candidate.model)
    candidate.train()
    assert flat(candidate.model).isfinite().all()
    assert not flat(candidate.model).equal(before)


# --- arguments ---


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"queries_per_sample": 0}, "queries_per_sample=0 must be"),
        ({"queries_per_sample": -3}, "queries_per_sample=-3 must be"),
        ({"queries_per_sample": 2.5}, "queries_per_sample=2.5 must be"),
        (
            {"queries_per_sample": 1},
            "queries_per_sample=1 is too few.*'one_sided'.*'optimal'.*at least 2",
        ),
        (
            {"queries_per_sample": 1, "preset": "mezo"},
            "queries_per_sample=1 is too few.*at least 2",
        ),
        (
            {"queries_per_sample": 2, "estimator": "antithetic"},
            "queries_per_sample=2 .*'antithetic'.*'optimal'.*at least 3",
        ),
        ({"preset": "best"}, "preset='best' is unknown: choose one of flops, mezo"),
        ({"allocator": "best"}, "allocator='best' is unknown: choose one of optimal"),
        ({"estimator": "three_sided"}, "estimator='three_sided' is unknown: .*antithetic"),
        ({"perturbation": "columnwise"}, "perturbation='columnwise' is unknown: .*rowwise"),
        ({"noise": "cauchy"}, "noise='cauchy' is unknown: .*gaussian"),
        ({"perturbation_scale": -0.1}, "perturbation_scale=-0.1 must be positive"),
        ({"perturbation_scale": 0.0}, "perturbation_scale=0.0 must be positive"),
        ({"perturbation_scale": float("nan")}, "perturbation_scale=nan must be positive"),
        (
            {"perturbation_scale": float("inf")},
            "perturbation_scale=inf must be positive and finite",
        ),
        ({"delta_clip": 0.0}, "delta_clip=0.0 must be positive"),
        ({"rows_per_forward": 0}, "rows_per_forward=0 must be a whole number"),
        ({"rows_per_forward": 2.5}, "rows_per_forward=2.5 must be a whole number"),
        ({"fp16": True}, "fp16=True is not supported"),
        ({"fsdp": "full_shard"}, "fsdp='full_shard' is not supported"),
        ({"deepspeed": "zero3.json"}, "deepspeed='zero3.json' is not supported"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True is not supported"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 is not supported"),
        ({"torch_compile": True}, "torch_compile=True is not supported"),
        ({"torch_compile_backend": "eager"}, "torch_compile_backend='eager' is not supported"),
        ({"torch_compile_mode": "default"}, "torch_compile_mode='default' is not supported"),
        ({"optim": "lomo"}, "optim='lomo' is not supported"),
        ({"optim": "adalomo"}, "optim='adalomo' is not supported"),
    ],
    ids=lambda value: (
        "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_arguments_are_checked_when_they_are_made(options, match, arguments):
    with refused(ConfigurationError, match):
        arguments(**options)


@pytest.mark.parametrize("option", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_is_switched_off_without_harm(option, arguments):
    args = arguments(**{option: True})
    candidate = trainer(args)
    assert_trains(candidate)
    assert not args.activation_checkpointing
    assert not candidate.model.is_gradient_checkpointing


def test_plain_arguments_are_refused(arguments):
    with refused(ConfigurationError, "args is a TrainingArguments: use FlopsTrainingArguments"):
        trainer(arguments(TrainingArguments))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            "2 processes were started, but they are not connected.*use_cpu=True",
        ),
        (
            {
                "ACCELERATE_MIXED_PRECISION": "no",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29500",
            },
            "asked for several processes but started one.*MULTI_CPU.*torchrun",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP shards the model for a backward pass"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed shards the model"),
    ],
)
def test_launchers_that_start_something_else_are_found(
    environment, message, arguments, monkeypatch
):
    args = arguments()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with refused(ConfigurationError, message):
        trainer(args)
    if "WORLD_SIZE" not in environment:  # with that, arguments for CPUs would wait for the others
        with refused(ConfigurationError, message):
            arguments()


@pytest.mark.parametrize(
    "option", [{"control_variate": "logit_jacobian"}, {"perturbation": "activation"}]
)
def test_what_scalars_cannot_tell_is_refused(option, arguments):
    with refused(ConfigurationError, f"{next(iter(option))}.*reduce='gradient'"):
        arguments(reduce="scalars", **option)
    assert arguments(reduce="scalars").control_variate == "none"


# --- models ---


def frozen():
    return tiny_model("vit").requires_grad_(False)


def in_inference_mode():
    return adapted(config=LoraConfig(r=2, target_modules=TARGETS["vit"], inference_mode=True))


@pytest.mark.parametrize(
    ("model", "advice"),
    [(frozen, "add an adapter"), (in_inference_mode, "its adapter .*is_trainable=True")],
)
def test_a_model_with_nothing_to_train_is_refused(model, advice, arguments):
    with refused(ConfigurationError, f"no trainable parameter: {advice}"):
        trainer(arguments(), model())


def test_an_adapter_on_an_adapter_is_refused(arguments):
    with refused(ConfigurationError, "PeftModel already"):
        trainer(arguments(), adapted(), peft_config=LoraConfig(target_modules=TARGETS["vit"]))


class Auxiliary(BertForSequenceClassification):
    """A head with a second term in its loss, which couples rows."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        outputs.loss = outputs.loss + 0.1 * outputs.logits.std(0, unbiased=False).mean()
        return outputs


class Coupled(BertForQuestionAnswering):
    """A head whose loss depends on how much the rows of a batch differ."""

    def forward(self, input_ids=None, start_positions=None, end_positions=None, **kwargs):
        positions = {"start_positions": start_positions, "end_positions": end_positions}
        outputs = super().forward(input_ids, **positions, **kwargs)
        outputs.loss = outputs.loss + 0.1 * outputs.start_logits.std(0, unbiased=False).mean()
        return outputs


def auxiliary():
    return adapted(
        "bert", lambda: Auxiliary(BertConfig(vocab_size=VOCABULARY, num_labels=CLASSES, **SIZES))
    ), data("bert")


def questions():
    model = adapted("bert", lambda: Coupled(BertConfig(vocab_size=VOCABULARY, **SIZES)))
    return model, [
        {**sample, "start_positions": 0, "end_positions": 1} for sample in unlabelled("bert")
    ]


def unlabelled(kind):
    return [
        {name: value for name, value in sample.items() if name != "labels"} for sample in data(kind)
    ]


WITHOUT_ROWS = [(auxiliary, "is not the mean"), (questions, "2 calls")]


@pytest.mark.parametrize(("case", "why"), WITHOUT_ROWS)
@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, "loss of its whole batch"),
        ({"perturbation": "rowwise"}, "loss of its whole batch"),
        ({"preset": "mezo"}, "batch as a whole"),
    ],
)
def test_a_loss_that_has_no_rows_is_computed_for_batches(
    case, why, options, how, arguments, notices
):
    model, dataset = case()
    assert_trains(trainer(arguments(**options), model, dataset))
    (message,) = notices()
    assert why in message
    assert how in message
    assert "objective=" in message
    assert_sentence(message)


class Penalised(FlopsTrainer):
    """Adds a term to the model's loss, and returns nothing else."""

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        outputs = model(**inputs)
        return outputs.loss + self.term(self, outputs.logits)


def penalty(candidate, _):
    return 0.1 * sum(
        p.square().sum() for name, p in candidate.model.named_parameters() if "lora_B" in name
    )


def spread(logits):
    return logits.std(0, unbiased=False).mean()  # it couples rows


def size(logits):
    return logits.square().mean()


def checked(candidate, logits):
    return (candidate.ledger.all_rows > 6) * spread(logits)  # after the first checks


def warmup(candidate, logits):
    return candidate.state.global_step * spread(logits)


def late(candidate, logits):
    return (candidate.positions.samples > 4) * spread(logits)  # in the step's second batch


def growing(candidate, logits):
    return candidate.state.global_step * size(logits)


def learned(candidate, logits):
    return (1 + penalty(candidate, logits)) * spread(logits)  # it reads trainable tensors itself


def late_learned(candidate, logits):
    return candidate.state.global_step * learned(candidate, logits)


def penalised(term, args):
    candidate = Penalised(adapted(), args, train_dataset=data())
    candidate.term = term
    return candidate


LOGGED = {
    "trajectory_log": True,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 4,
}


@pytest.mark.parametrize(
    ("term", "options"),
    [(checked, {}), (warmup, {"preset": "mezo"}), (warmup, LOGGED), (learned, {})],
)
def test_a_loss_whose_rows_are_lost_is_computed_for_batches(
    term, options, arguments, notices, tmp_path
):
    candidate = penalised(term, arguments(max_steps=3, **options))
    assert_trains(candidate)
    *_, message = notices()
    whole = term is learned or "preset" in options
    assert ("batch as a whole" if whole else "loss of its whole batch") in message
    assert "is not the mean" in message
    assert_sentence(message)
    # what was done in vain stays counted
    assert candidate.ledger.all_rows > candidate.ledger.rows == 3 * 8 * 4
    if candidate.args.trajectory_log:
        rebuilt = replay(tmp_path).parameters
        assert all(
            rebuilt[name].equal(p)
            for name, p in candidate.model.named_parameters()
            if p.requires_grad
        )


@pytest.mark.parametrize("term", [penalty, growing])
def test_a_loss_with_a_second_term_is_computed_for_each_row(term, arguments, notices):
    candidate = penalised(term, arguments(max_steps=3))
    assert_trains(candidate)
    assert isinstance(candidate.session.chosen.objective, RowwiseLoss)
    messages = notices()
    assert not any("batch as a whole" in message for message in messages)
    if term is growing:
        (message,) = messages
        assert "split into rows in another way from now on" in message
        assert_sentence(message)


def test_a_loss_whose_rows_are_lost_where_it_cannot_change_is_refused(arguments):
    with refused(
        ObjectiveError, "during a step that trajectory_log records: .* is not the mean .* Resume"
    ):
        penalised(late, arguments(**LOGGED)).train()
    with refused(
        ObjectiveError, 'perturbation="rowwise" needs a loss per row, but .* only the parameters'
    ):
        penalised(learned, arguments(perturbation="rowwise")).train()
    with refused(
        ObjectiveError, 'perturbation="rowwise" needs a loss per row, but .* only the parameters'
    ):
        penalised(late_learned, arguments(perturbation="rowwise")).train()
    candidate = penalised(warmup, arguments())
    candidate.group.world = 2
    with refused(
        ObjectiveError, "Cannot fall back to a batch-level loss during a run of 2 processes"
    ):
        candidate.session.fall_back(RowLossError("it has two terms"), recorded=False)
    model, dataset = auxiliary()
    # an objective of the user's own stays
    with pytest.raises(RowLossError, match="is not the mean"):
        trainer(arguments(), model, dataset, objective=TappedLoss()).train()


WITHOUT_RULE = {
    "adaption_prompt": (
        "llama",
        AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
    ),
    "trainable_embedding": ("bert", CartridgeConfig(num_virtual_tokens=3, task_type="SEQ_CLS")),
}


@pytest.mark.parametrize("name", WITHOUT_RULE)
def test_tensors_without_a_rule_share_noise(name, arguments, notices):
    kind, config = WITHOUT_RULE[name]
    assert_trains(trainer(arguments(), adapted(kind, config=config), data(kind)))
    (message,) = notices()
    assert "noise that is shared by the batch" in message
    assert_sentence(message)


@pytest.mark.parametrize("name", WITHOUT_RULE)
def test_tensors_without_a_rule_cannot_have_noise_per_row(name, arguments):
    kind, config = WITHOUT_RULE[name]
    with refused(
        ConfigurationError, f'perturbation="rowwise" has no rule that is right for .*{name}'
    ):
        trainer(arguments(perturbation="rowwise"), adapted(kind, config=config), data(kind)).train()


# --- data ---


def test_a_batch_of_one_trains_with_a_warning(arguments, notices):
    assert_trains(trainer(arguments(per_device_train_batch_size=1)))
    (message,) = notices()
    assert "per_device_train_batch_size=1" in message
    assert_sentence(message)


def test_a_last_batch_of_one_needs_no_warning(arguments, notices):
    assert_trains(
        trainer(arguments(per_device_train_batch_size=4, max_steps=3), dataset=data(samples=5))
    )
    assert notices() == []


def test_an_empty_data_set_is_refused(arguments):
    with refused(ConfigurationError, "train_dataset is empty"):
        FlopsTrainer(adapted(), arguments(), train_dataset=[])


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_missing_labels_are_refused(kind, arguments):
    with refused(ObjectiveError, r"no labels: its keys are \[.*(pixel_values|input_ids)"):
        trainer(arguments(), adapted(kind), unlabelled(kind)).train()


@pytest.mark.parametrize("preset", ["flops", "mezo"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 2)])
def test_an_objective_of_the_wrong_shape_is_refused(shape, preset, arguments):
    with refused(ObjectiveError, r"returned losses of shape \(.*\) for \d+ rows"):
        trainer(
            arguments(preset=preset),
            objective=lambda outputs, inputs: outputs.logits.new_zeros(shape),
        ).train()


# --- losses that are not finite ---


def poisoned(*samples, kind="vit", name="pixel_values"):
    batch = tiny_batch(kind, 8)
    batch[name][list(samples)] = float("nan")
    return as_dataset(batch)


@pytest.mark.parametrize("preset", ["flops", "mezo", "flops-authors"])
@pytest.mark.parametrize("samples", [(5,), (0,), (0, 1, 7)])
def test_poisoned_samples_are_dropped_and_counted(samples, preset, arguments, notices):
    whole = {"per_device_train_batch_size": 8, "train_sampling_strategy": "sequential"}
    candidate = trainer(arguments(preset=preset, **whole), dataset=poisoned(*samples))
    assert_trains(candidate)
    entries = [entry for entry in candidate.state.log_history if "loss" in entry]
    assert all(len(samples) <= entry["dropped_rows"] < 8 * 4 for entry in entries)
    assert notices() == []  # the self-check looks at samples that can tell
    assert candidate.session.chosen.perturbation.shares_noise == (preset != "flops")


def test_a_poisoned_sample_does_not_hide_a_rule_that_is_right(arguments):
    whole = {"per_device_train_batch_size": 8, "train_sampling_strategy": "sequential"}
    assert_trains(trainer(arguments(perturbation="rowwise", **whole), dataset=poisoned(0)))


def test_rows_that_fail_by_chance_are_dropped_and_counted(arguments):
    def sometimes(outputs, inputs):
        losses = torch.nn.functional.cross_entropy(
            outputs.logits, inputs["labels"], reduction="none"
        )
        losses[2::5] = float("inf")
        losses[3::5] = float("nan")
        return losses

    candidate = trainer(
        arguments(queries_per_sample=8, per_device_train_batch_size=8), objective=sometimes
    )
    assert_trains(candidate)
    assert all(
        entry["dropped_rows"] > 8 for entry in candidate.state.log_history if "loss" in entry
    )


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("preset", ["flops", "mezo"])
def test_a_batch_without_any_label_changes_nothing(preset, poison, batches, arguments):
    batch = tiny_batch("vit", 8)
    batch["labels"][:] = -100
    if poison:  # the only sample with a label is the one that fails
        batch["labels"][5], batch["pixel_values"][5] = 1, float("nan")
    args = arguments(
        preset=preset, per_device_train_batch_size=8 // batches, gradient_accumulation_steps=batches
    )
    candidate = trainer(args, dataset=as_dataset(batch))
    before = flat(candidate.model)
    candidate.train()
    assert flat(candidate.model).equal(before)


@pytest.mark.parametrize("perturbation", ["auto", "shared"])
@pytest.mark.parametrize(
    "objective", [None, lambda outputs, inputs: outputs.logits[:, 0]], ids=["loss", "objective"]
)
@pytest.mark.parametrize("first", [True, False])
def test_without_any_finite_row_nothing_is_touched(first, objective, perturbation, arguments):
    candidate = trainer(arguments(perturbation=perturbation), objective=objective)
    if not first:
        candidate.train()
    before = flat(candidate.model)
    for value in candidate.model.parameters():
        value.grad = torch.ones_like(value) if value.requires_grad else None
    candidate.current_gradient_accumulation_steps = 1
    batch = tiny_batch("vit")
    batch["pixel_values"][:] = float("nan")
    with refused(NonFiniteError, "finite loss"):
        candidate.training_step(candidate.model, batch, None)
    assert flat(candidate.model).equal(before)
    assert all(
        value.grad.eq(1).all() for value in candidate.model.parameters() if value.requires_grad
    )
