"""FlopsTrainer is the stock Trainer in everything but how the gradient is found."""

import dataclasses
import json
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import HPSearchBackend

import hf_flops.autotune.session
from hf_flops import (
    ConfigurationError,
    FlopsArgumentsMixin,
    FlopsTrainer,
    FlopsTrainerMixin,
    FlopsTrainingArguments,
)
from hf_flops.allocators import Uniform
from hf_flops.estimators import Antithetic
from hf_flops.objectives import TappedLoss
from hf_flops.perturbations import ParameterVector, RowwiseNoise
from hf_flops.trainer import PRESETS
from tests.helpers.runs import (
    TARGETS,
    Coupled,
    adapted,
    data,
    flat,
    logged,
    parameters,
    question_answerer,
    questions,
    short,
    short_run,
)
from tests.helpers.tiny import (
    as_dataset,
    tiny_batch,
    tiny_model,
)

BOTH = [(Trainer, TrainingArguments), (FlopsTrainer, FlopsTrainingArguments)]
OWN_FIELDS = [
    field for field in dataclasses.fields(FlopsArgumentsMixin) if field.name != "learning_rate"
]


@pytest.fixture
def arguments(tmp_path):
    """Return what builds training arguments that suit tiny models."""
    return partial(short, tmp_path)


def prompted():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(
            tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        )


def right(outputs, inputs):
    """Return 1 for every wrong answer: an objective without derivative."""
    return (outputs.logits.argmax(-1) != inputs["labels"]).float()


# --- drop-in ---


@pytest.mark.parametrize(("trainer_class", "args_class"), BOTH)
def test_the_stock_image_classification_flow(trainer_class, args_class, arguments, tmp_path):
    batch = tiny_batch("vit", 16)
    dataset = Dataset.from_dict(
        {**{k: v.numpy() for k, v in batch.items()}, "name": list("abcdefghijklmnop")}
    )
    dataset = dataset.with_format("torch")

    def compute_metrics(prediction):
        return {
            "accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())
        }

    args = arguments(
        args_class,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    trainer = trainer_class(
        model=adapted(),
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset,
        compute_metrics=compute_metrics,
    )
    before = flat(trainer)
    output = trainer.train()
    assert output.global_step == 4
    assert np.isfinite(output.training_loss)
    assert not flat(trainer).equal(before)
    assert len(logged(trainer, "loss")) == 4
    assert len(logged(trainer, "eval_accuracy")) == 2
    metrics = trainer.evaluate()
    predictions = trainer.predict(dataset).predictions
    assert metrics["eval_accuracy"] == (predictions.argmax(-1) == batch["labels"].numpy()).mean()
    trainer.save_model(tmp_path / "saved")
    for folder in ("saved", "checkpoint-4"):
        model = PeftModel.from_pretrained(tiny_model("vit"), tmp_path / folder, is_trainable=True)
        again = trainer_class(model, arguments(args_class))
        np.testing.assert_array_equal(again.predict(dataset).predictions, predictions)


def test_a_plain_model_is_wrapped(arguments):
    config = LoraConfig(r=2, target_modules=TARGETS["vit"])
    trainer = FlopsTrainer(tiny_model("vit"), arguments(), train_dataset=data(), peft_config=config)
    assert isinstance(trainer.model, PeftModel)
    before = flat(trainer)
    trainer.train()
    assert not flat(trainer).equal(before)


@pytest.mark.parametrize("config", [None, LoraConfig(r=2, target_modules=TARGETS["vit"])])
def test_model_init_starts_afresh_every_time(config, arguments):
    def model_init():
        return adapted() if config is None else tiny_model("vit")

    trainer = FlopsTrainer(
        args=arguments(max_steps=1), model_init=model_init, train_dataset=data(), peft_config=config
    )
    trainer.train()
    first = flat(trainer)
    trainer.train()
    assert flat(trainer).equal(first)
    assert isinstance(trainer.model, PeftModel)


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"optim": "sgd", "lr_scheduler_type": "linear", "weight_decay": 0.1},
        {"optim": "adafactor", "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1},
    ],
    ids=lambda options: options["optim"],
)
def test_optimizers_and_schedules_are_the_stock_ones(options, arguments):
    rates, optimizers = [], []
    for trainer_class, args_class in BOTH:
        args = arguments(args_class, max_steps=4, learning_rate=0.01, **options)
        trainer = trainer_class(adapted(), args, train_dataset=data())
        before = flat(trainer)
        trainer.train()
        rates.append(logged(trainer, "learning_rate"))
        optimizers.append(type(trainer.optimizer.optimizer))
        assert flat(trainer).isfinite().all()
        assert not flat(trainer).equal(before)
        assert min(logged(trainer, "grad_norm")) > 0
    assert rates[0] == rates[1]
    assert optimizers[0] is optimizers[1]


def test_gradients_are_clipped(arguments):
    args = arguments(
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.01,
        closed_form_head="gradient",
    )
    trainer = FlopsTrainer(adapted(), args, train_dataset=data())
    before = flat(trainer)
    trainer.train()
    assert float((flat(trainer) - before).norm()) == pytest.approx(0.01, rel=1e-3)


class Recorder(TrainerCallback):
    """Writes down every event of a run."""

    def __init__(self):
        self.events = []
        for name in vars(TrainerCallback):
            if name.startswith("on_"):
                setattr(self, name, partial(self.record, name))

    def record(self, name, args, state, control, **rest):
        self.events.append((name, state.global_step))


def test_callbacks_early_stopping_and_the_best_model(arguments, tmp_path):
    events = []
    for trainer_class, args_class in BOTH:
        args = arguments(
            args_class,
            output_dir=str(tmp_path / trainer_class.__name__),
            max_steps=9,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="constant",
        )
        recorder = Recorder()
        trainer = trainer_class(
            adapted(),
            args,
            train_dataset=data(samples=16),
            eval_dataset=data(),
            compute_metrics=lambda prediction: {"constant": 1.0},
            callbacks=[recorder, EarlyStoppingCallback(2)],
        )
        trainer.train()
        events.append(recorder.events)
        assert trainer.state.global_step == 3  # the best value, and two without a better one
        best = PeftModel.from_pretrained(
            tiny_model("vit"), tmp_path / trainer_class.__name__ / "checkpoint-1"
        )
        saved = dict(best.named_parameters())
        assert all(value.equal(saved[name]) for name, value in parameters(trainer).items())
    assert events[0] == events[1]


class FlopsSeq2SeqTrainer(FlopsTrainerMixin, Seq2SeqTrainer):
    pass


@dataclasses.dataclass
class FlopsSeq2SeqArguments(FlopsArgumentsMixin, Seq2SeqTrainingArguments):
    pass


def test_other_trainers_take_the_mixin(arguments):
    args = arguments(FlopsSeq2SeqArguments, predict_with_generate=True, generation_max_length=5)
    shapes = []

    def compute_metrics(prediction):
        shapes.append(prediction.predictions.shape[:1] + prediction.label_ids.shape)
        return {"right": 1.0}

    trainer = FlopsSeq2SeqTrainer(
        adapted("t5"),
        args,
        train_dataset=data("t5"),
        eval_dataset=data("t5"),
        compute_metrics=compute_metrics,
    )
    before = flat(trainer)
    trainer.train()
    assert not flat(trainer).equal(before)
    assert trainer.evaluate()["eval_right"] == 1.0
    assert shapes == [(8, 8, 20)]


# --- configurations that must give the same run ---


@pytest.mark.parametrize("batch", [8, 2])
def test_a_loss_function_of_the_users_is_followed(batch, arguments):
    def loss_function(outputs, labels, num_items_in_batch=None):
        return (
            nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
            / num_items_in_batch
        )

    options = {
        "optim": "sgd",
        "learning_rate": 0.01,
        "gradient_accumulation_steps": 8 // batch,
        "perturbation": "rowwise",
    }
    args = arguments(per_device_train_batch_size=batch, **options)
    found = short_run(args, dtype=torch.float64, compute_loss_func=loss_function)
    torch.testing.assert_close(
        flat(found), flat(short_run(args, dtype=torch.float64)), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize(
    "weighing", [{"weight": torch.tensor([1.0, 10.0, 3.0])}, {"ignore_index": 0}], ids=str
)
def test_a_loss_that_weighs_or_ignores_classes_is_a_mean(weighing, batches, arguments):
    def loss_of(model, inputs):
        return nn.functional.cross_entropy(
            model(inputs["pixel_values"]).logits, inputs["labels"], **weighing
        )

    class Weighing(FlopsTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **options):
            return loss_of(model, inputs)

    model, batch = adapted().eval(), tiny_batch("vit", 8)
    size = {"per_device_train_batch_size": 8 // batches, "gradient_accumulation_steps": batches}
    with torch.no_grad():
        parts = [
            {name: value[own] for name, value in batch.items()}
            for own in torch.arange(8).chunk(batches)
        ]
        wanted = sum(float(loss_of(model, part)) for part in parts) / batches
    args = arguments(max_steps=1, train_sampling_strategy="sequential", **size)
    trainer = Weighing(model, args, train_dataset=as_dataset(batch))
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([wanted], rel=1e-4)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.narrow, self.wide = nn.Linear(6, 3), nn.Linear(3, 6)

    def forward(self, x):
        return {"loss": nn.functional.mse_loss(self.wide(self.narrow(x).tanh()), x)}


def test_a_model_that_makes_its_loss_without_labels_is_trained(arguments):
    rows = list(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    trainer = FlopsTrainer(Autoencoder(), arguments(), train_dataset=[{"x": row} for row in rows])
    before = flat(trainer)
    trainer.train()
    assert not flat(trainer).equal(before)
    assert trainer.session.chosen.objective.per_row


def test_a_second_run_starts_with_nothing_learned_or_counted(arguments):
    trainer = FlopsTrainer(model_init=lambda: adapted(), args=arguments(), train_dataset=data())
    trainer.train()
    first, rows = flat(trainer), trainer.ledger.rows
    trainer.train()
    assert trainer.ledger.rows == rows
    assert flat(trainer).equal(first)


def test_a_run_follows_what_the_arguments_say_by_then(arguments):
    trainer = FlopsTrainer(adapted(), arguments(max_steps=4), train_dataset=data(samples=16))
    trainer.args.estimator, trainer.args.max_queries = "antithetic", 170
    trainer.train()
    changed = short_run(arguments(max_steps=4, estimator="antithetic", max_queries=170))
    assert trainer.state.global_step == changed.state.global_step < 4
    assert flat(trainer).equal(flat(changed))


def test_a_run_follows_the_arguments_of_its_trial(arguments):
    trainer = FlopsTrainer(adapted(), arguments(), train_dataset=data())
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    chosen = {"estimator": "antithetic", "allocator": "uniform", "control_variate": "none"}
    trainer._hp_search_setup(SimpleNamespace(params=chosen))  # which the stock `train` calls
    assert (
        type(trainer.session.estimator),
        type(trainer.session.allocator),
        trainer.session.control,
    ) == (
        Antithetic,
        Uniform,
        None,
    )


def test_instances_take_the_place_of_names(arguments):
    named = arguments(preset="mezo", perturbation="rowwise")
    model, args = adapted(), arguments()
    rowwise = RowwiseNoise(model, ParameterVector.of(model), "gaussian")
    parts = {
        "allocator": Uniform(),
        "estimator": Antithetic(),
        "objective": TappedLoss(),
        "perturbation": rowwise,
    }
    trainer = FlopsTrainer(model, args, train_dataset=data(samples=16), **parts)
    trainer.train()
    assert flat(trainer).equal(flat(short_run(named)))


def test_the_seed_fixes_the_run(arguments):
    run = flat(short_run(arguments()))
    assert flat(short_run(arguments())).equal(run)
    assert flat(short_run(arguments(noise_seed=42))).equal(run)  # the seed of the run
    assert not flat(short_run(arguments(noise_seed=7))).equal(run)


def test_noise_is_placed_by_step_position_and_epoch(arguments, monkeypatch):
    places = []

    def estimate_gradient(forward, inputs, method, place, *rest, **options):
        places.append((place.seed, place.step, place.position, round(place.epoch * 3)))
        return original(forward, inputs, method, place, *rest, **options)

    original = hf_flops.autotune.session.estimate_gradient
    monkeypatch.setattr(hf_flops.autotune.session, "estimate_gradient", estimate_gradient)
    args = arguments(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, seed=5
    )
    # micro-batches of 2, 2 | 2 in each epoch
    FlopsTrainer(adapted(), args, train_dataset=data(samples=6)).train()
    first, second = (
        [(5, 0, 0, 0), (5, 0, 2, 0), (5, 1, 0, 2)],
        [(5, 2, 0, 3), (5, 2, 2, 3), (5, 3, 0, 5)],
    )
    assert places == [*first, *second]  # seed, step, position, thirds of epochs


# --- what a step leaves alone ---


def global_generators():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def one_step(trainer, batch):
    """Do what the stock loop does for one batch, up to the optimizer's step."""
    trainer.current_gradient_accumulation_steps = 1
    return trainer.training_step(trainer.model, batch, None)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_does_not_touch_global_generators(preset, arguments):
    trainer = FlopsTrainer(adapted(), arguments(preset=preset), train_dataset=data())
    before = global_generators()
    one_step(trainer, tiny_batch("vit"))
    one_step(trainer, tiny_batch("vit"))
    assert global_generators() == before


def test_a_run_leaves_global_generators_as_the_stock_loop_does(arguments):
    after = []
    for trainer_class, args_class in BOTH:
        model = adapted(dropout=0.0)  # dropout is all that the stock step would draw
        trainer_class(model, arguments(args_class, max_steps=3), train_dataset=data()).train()
        after.append(global_generators())
    assert after[0] == after[1]


def state(model):
    """Return everything about a model that a step might forget to put back."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "training": [module.training for module in model.modules()],
        "hooks": [list(getattr(module, hook)) for module in model.modules() for hook in hooks],
        "patches": [
            sorted(name for name in vars(module) if callable(vars(module)[name]))
            for module in model.modules()
        ],
        "storage": [
            (name, value.data_ptr(), value.requires_grad)
            for name, value in model.named_parameters()
        ],
        "values": [value.tolist() for value in model.state_dict().values()],
        "grad mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("perturbation", ["auto", "shared"])
@pytest.mark.parametrize(
    ("kind", "build"), [("vit", adapted), ("llama", prompted)], ids=["lora", "prompt"]
)
def test_a_step_changes_gradients_only(kind, build, perturbation, arguments):
    args = arguments(perturbation=perturbation, closed_form_head="gradient")
    trainer = FlopsTrainer(build(), args, train_dataset=data(kind))
    trainer.model.train()
    next(module for module in trainer.model.modules() if isinstance(module, nn.Linear)).eval()
    before = state(trainer.model)
    loss = one_step(trainer, tiny_batch(kind))
    assert state(trainer.model) == before
    assert loss.dim() == 0
    assert not loss.requires_grad
    trainable = [value for value in trainer.model.parameters() if value.requires_grad]
    assert all(value.grad is not None and value.grad.isfinite().all() for value in trainable)
    assert all(
        value.grad is None for value in trainer.model.parameters() if not value.requires_grad
    )
    first = [value.grad.clone() for value in trainable]
    trainer.state.global_step = 1
    one_step(trainer, tiny_batch(kind))
    assert not all(value.grad.equal(old) for value, old in zip(trainable, first, strict=True))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("perturbation", ["auto", "shared"])
@pytest.mark.parametrize(
    ("kind", "build"), [("vit", adapted), ("llama", prompted)], ids=["lora", "prompt"]
)
def test_a_failing_forward_leaves_nothing_behind(kind, build, perturbation, arguments, monkeypatch):
    model, args = (
        build(),
        arguments(perturbation=perturbation, rows_per_forward=2, late_expansion=False),
    )  # its check goes on
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    original, calls, fatal = last.forward, [], []

    def forward(*args, **kwargs):
        calls.append(1)
        if len(calls) in fatal:
            raise Interrupted
        return original(*args, **kwargs)

    monkeypatch.setattr(last, "forward", forward)
    whole = FlopsTrainer(model, args, train_dataset=data(kind))
    before = state(model)
    one_step(whole, tiny_batch(kind))
    model.zero_grad()
    total = len(calls)
    assert total > 7
    # In the objective's check, in the rules' check, at the clean forward, and amid the perturbed
    # rows.
    for fatal_call in {1, total // 3, total // 2, total - 7, total - 6, total - 2, total}:
        calls, fatal = [], [fatal_call]
        trainer = FlopsTrainer(model, args, train_dataset=data(kind))
        with pytest.raises(Interrupted):
            one_step(trainer, tiny_batch(kind))
        assert state(model) == before
        assert all(value.grad is None for value in model.parameters())


# --- forward only ---


class Wall(torch.autograd.Function):
    """The identity, with a backward that must never run."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise Interrupted


class Walled(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout, self.seen = nn.Dropout(0.5), set()

    def forward(self, x):
        self.seen.add((self.training, torch.is_grad_enabled(), x.requires_grad))
        return self.dropout(Wall.apply(x))


def test_no_backward_runs_and_no_graph_is_built(arguments):
    def walled():
        model = tiny_model("vit", hidden_dropout_prob=0.3)
        model.vit.layernorm = nn.Sequential(model.vit.layernorm, Walled())
        return adapted(model=model)

    with pytest.raises(Interrupted):
        Trainer(walled(), arguments(TrainingArguments), train_dataset=data()).train()
    trainer = FlopsTrainer(walled(), arguments(), train_dataset=data())
    before = flat(trainer)
    trainer.train()
    assert not flat(trainer).equal(before)
    (wall,) = (module for module in trainer.model.modules() if isinstance(module, Walled))
    assert wall.seen == {(False, False, False)}


@pytest.mark.parametrize(
    "objective",
    [right, lambda outputs, inputs: outputs.logits[:, 0]],
    ids=["accuracy", "no labels"],
)
def test_an_objective_needs_neither_derivative_nor_labels(objective, arguments):
    inputs = (
        data()
        if objective is right
        else [{"pixel_values": sample["pixel_values"]} for sample in data()]
    )
    args = arguments(perturbation_scale=0.5, queries_per_sample=8)
    trainer = FlopsTrainer(adapted(), args, train_dataset=inputs, objective=objective)
    before = flat(trainer)
    trainer.train()
    assert flat(trainer).isfinite().all()
    assert not flat(trainer).equal(before)
    assert logged(trainer, "dropped_rows") == [0, 0]


# --- budget, presets, logs ---


@pytest.mark.parametrize("queries", [4, 7])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("per_row", [True, False])
def test_every_row_is_counted_and_the_budget_is_kept(
    per_row, preset, queries, arguments, monkeypatch
):
    counted, counting = [], []

    # not reached by a pass that stops at what no noise reaches
    def count(module, args, inputs, outputs):
        if counting:
            counted.append(len(next(iter((*args, *inputs.values())))))

    def estimate_gradient(*args, **kwargs):  # what the self-check runs is not part of the budget
        counting.append(True)
        result = original(*args, **kwargs)
        counting.clear()
        return result

    original = hf_flops.autotune.session.estimate_gradient
    monkeypatch.setattr(hf_flops.autotune.session, "estimate_gradient", estimate_gradient)
    model, dataset = (
        (adapted(), data(samples=10)) if per_row else (question_answerer(Coupled), questions(10))
    )
    # batches of 4, 4 and 2
    args = arguments(preset=preset, queries_per_sample=queries, max_steps=3)
    # a loss that is computed again calls the model again, but none of its layers
    watched = model if per_row else model.get_base_model().bert
    watched.register_forward_hook(count, with_kwargs=True)
    trainer = FlopsTrainer(model, args, train_dataset=dataset)
    trainer.train()
    assert logged(trainer, "rows")[-1] == trainer.ledger.rows == sum(counted)
    assert 10 * (queries - 1) <= trainer.ledger.rows <= 10 * queries
    assert flat(trainer).isfinite().all()


def test_queries_are_counted_by_sample_id(arguments):
    samples = [{**sample, "sample_id": 10 * i} for i, sample in enumerate(data())]
    # those that make nothing of ids
    options = {"max_steps": 4, "allocator": "loss_rank", "closed_form_head": "gradient"}
    with_ids = FlopsTrainer(adapted(), arguments(**options), train_dataset=samples)
    without = FlopsTrainer(adapted(), arguments(**options), train_dataset=data())
    with_ids.train()
    without.train()
    assert flat(with_ids).equal(flat(without))
    assert sorted(with_ids.ledger.sample_queries) == list(range(0, 80, 10))
    steps, queries = zip(*with_ids.ledger.sample_queries.values(), strict=True)
    assert set(steps) == {2}  # two epochs
    assert sum(queries) == with_ids.ledger.rows - 16  # the clean rows
    assert without.ledger.sample_queries == {}


def test_the_optimal_allocator_remembers_samples_by_their_ids(arguments):
    samples = [{**sample, "sample_id": 10 * i} for i, sample in enumerate(data())]
    trainer = FlopsTrainer(adapted(), arguments(max_steps=4), train_dataset=samples)
    trainer.train()
    remembered = trainer.session.allocator.state_dict()["history"]["past"]
    assert sorted(entry[0] for entry in remembered) == list(range(0, 80, 10))


def test_presets_fill_in_what_is_not_given(arguments):
    for name, values in PRESETS.items():
        args = arguments(preset=name)
        assert {option: getattr(args, option) for option in values} == values
        for option, given in {
            "noise": "gaussian",
            "perturbation": "rowwise",
            "allocator": "uniform",
        }.items():
            assert getattr(arguments(preset=name, **{option: given}), option) == given


class Watch(TrainerCallback):
    """Notes after every step which tensors have moved so far."""

    def __init__(self, model):
        self.model, self.moved = model, []
        self.start = {
            name: value.detach().clone()
            for name, value in model.named_parameters()
            if value.requires_grad
        }

    def on_step_end(self, *args, **kwargs):
        now = dict(self.model.named_parameters())
        moved = {name for name, value in self.start.items() if not now[name].equal(value)}
        self.moved.append(
            {
                part
                for part in ("lora_A", "lora_B", "classifier")
                if any(part in name for name in moved)
            }
        )


@pytest.mark.parametrize(("parts", "joins"), [("both", 0), ("B_then_A", 2), ("B", 4)])
def test_lora_a_is_held_back_as_asked(parts, joins, arguments):
    model = adapted()
    watch = Watch(model)
    args = arguments(lora_parts=parts, max_steps=4, learning_rate=0.1, closed_form_head="gradient")
    FlopsTrainer(model, args, train_dataset=data(), callbacks=[watch]).train()
    late = [{"lora_A"} if step >= joins else set() for step in range(4)]
    assert watch.moved == [{"lora_B", "classifier"} | own for own in late]


@pytest.mark.parametrize("trained", [False, True])
def test_lora_a_is_trained_by_default_if_the_adapter_is_not_new(trained, arguments):
    model = adapted()
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.1)
    watch = Watch(model)
    options = {"max_steps": 2, "learning_rate": 0.1, "closed_form_head": "gradient"}
    args = arguments(lora_parts="auto", **options)
    FlopsTrainer(model, args, train_dataset=data(), callbacks=[watch]).train()
    assert watch.moved == [{"lora_B", "classifier"} | ({"lora_A"} if trained else set())] * 2


def test_arguments_may_be_those_of_several_runs(arguments):
    args, trained = arguments(lora_parts="auto"), adapted()
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    runs = [FlopsTrainer(model, args, train_dataset=data()) for model in (adapted(), trained)]
    assert [run.args.lora_parts for run in runs] == ["B", "both"]
    assert args.lora_parts == "auto"


def test_a_resumed_run_trains_the_parts_of_lora_that_it_began_with(arguments):
    options = {"lora_parts": "auto", "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = FlopsTrainer(adapted(), arguments(**options), train_dataset=data())
    whole.train()
    checkpoint = f"{whole.args.output_dir}/checkpoint-2"
    model = PeftModel.from_pretrained(tiny_model("vit"), checkpoint, is_trainable=True)
    again = FlopsTrainer(model, arguments(**options), train_dataset=data())
    assert again.args.lora_parts == "both"
    again.train(resume_from_checkpoint=checkpoint)
    assert again.args.lora_parts == "B"
    assert flat(again).equal(flat(whole))


class Freeze(TrainerCallback):
    """Freezes half of the adapter after the first of four steps, and lets it go on after the
    third.
    """

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        mine = {
            name: value
            for name, value in model.named_parameters()
            if "lora_B" in name and "layers.0" in name
        }
        self.seen.append({name: value.detach().clone() for name, value in mine.items()})
        for value in mine.values():
            value.requires_grad_(state.global_step not in (1, 2))


@pytest.mark.parametrize("rate", [0.1, "auto"])
def test_what_a_callback_freezes_stays(rate, arguments):
    freeze = Freeze()
    args = arguments(max_steps=4, learning_rate=rate, weight_decay=0.1)
    FlopsTrainer(adapted(), args, train_dataset=data(samples=16), callbacks=[freeze]).train()
    assert len(freeze.seen[0]) == 2
    for name in freeze.seen[0]:
        first, second, third, fourth = (seen[name] for seen in freeze.seen)
        assert first.equal(second)
        assert first.equal(third)
        assert not first.equal(fourth)


def test_an_adapter_of_nothing_but_lora_a_cannot_be_held_back(arguments):
    model = adapted()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    with pytest.raises(ConfigurationError, match="nothing but lora_A to train"):
        FlopsTrainer(model, arguments(lora_parts="B"), train_dataset=data()).train()


def test_the_log_has_the_documented_keys(arguments):
    trainer = short_run(arguments(max_steps=4, logging_steps=2))
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert {"grad_norm", "learning_rate", "allocation_gain", "dropped_rows", "rows"} <= set(
            entry
        )
        assert 0 < entry["allocation_entropy"] <= 1
        assert entry["signal_to_noise"] >= 0
    assert all(isinstance(value, (int, float)) for entry in entries for value in entry.values())
    json.loads(json.dumps(entries, allow_nan=False))


def test_the_logged_loss_is_the_clean_one(arguments):
    trainer = FlopsTrainer(
        adapted(), arguments(max_steps=1, per_device_train_batch_size=8), train_dataset=data()
    )
    expected = FlopsTrainer(adapted(), arguments(), eval_dataset=data()).evaluate()["eval_loss"]
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([expected], rel=1e-4)


def test_arguments_survive_json(arguments):
    args = arguments(preset="mezo", queries_per_sample=6, perturbation_scale=0.02, noise_seed=3)
    values = json.loads(args.to_json_string())
    own = {field.name: values[field.name] for field in OWN_FIELDS}
    assert own == {field.name: getattr(args, field.name) for field in OWN_FIELDS}
    assert json.loads(FlopsTrainingArguments(**values).to_json_string()) == values


def test_the_command_line_knows_every_field(tmp_path):
    parser = HfArgumentParser(FlopsTrainingArguments)
    usage = " ".join(parser.format_help().split())
    for field in OWN_FIELDS:
        assert f"--{field.name}" in usage
        assert field.metadata["help"].endswith(".")
    words = [
        "--preset=mezo",
        "--queries_per_sample=8",
        "--perturbation_scale=0.01",
        "--allocator=optimal",
        "--use_cpu",
    ]
    (args,) = parser.parse_args_into_dataclasses([*words, f"--output_dir={tmp_path}"])
    assert (args.preset, args.queries_per_sample, args.perturbation_scale) == ("mezo", 8, 0.01)
    assert (args.allocator, args.estimator, args.rows_per_forward) == (
        "optimal",
        "antithetic",
        "auto",
    )


def test_models_are_tagged(arguments, tmp_path):
    trainer = FlopsTrainer(adapted(), arguments(), train_dataset=data())
    assert set(FlopsTrainer._tag_names) <= set(trainer.model.model_tags)
    trainer.save_model(tmp_path)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert all(tag in card for tag in FlopsTrainer._tag_names)
