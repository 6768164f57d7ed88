"""Short runs of FlopsTrainer on tiny models."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForQuestionAnswering

from hf_flops import FlopsArgumentsMixin, FlopsTrainer, FlopsTrainingArguments
from tests.helpers.tiny import (
    SIZES,
    TASKS,
    VOCABULARY,
    as_dataset,
    double,
    tiny_batch,
    tiny_model,
    training_arguments,
)

TARGETS = {"vit": ["q_proj", "v_proj"], "bert": ["query", "value"], "t5": ["q", "v"]}


def short(folder, kind=FlopsTrainingArguments, **options):
    """Return training arguments that suit tiny models."""
    few = {"queries_per_sample": 4} if issubclass(kind, FlopsArgumentsMixin) else {}
    defaults = {"per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1}
    return training_arguments(folder, kind, **{**defaults, **few, **options})


def adapted(kind="vit", model=None, dropout=0.1):
    config = LoraConfig(
        r=2,
        target_modules=TARGETS.get(kind, ["q_proj", "v_proj"]),
        task_type=TASKS[kind],
        lora_dropout=dropout,
        modules_to_save=["classifier"] if kind == "vit" else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(tiny_model(kind) if model is None else model, config)


def data(kind="vit", samples=8):
    return as_dataset(tiny_batch(kind, samples))


def parameters(trainer):
    return {
        name: value.detach().clone()
        for name, value in trainer.model.named_parameters()
        if value.requires_grad
    }


def flat(trainer):
    return torch.cat([value.flatten() for value in parameters(trainer).values()])


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def short_run(args, kind="vit", dtype=torch.float32, **options):
    model, dataset = (
        (question_answerer(), questions())
        if kind == "questions"
        else (adapted(kind), data(kind, 16))
    )
    if dtype == torch.float64:
        dataset = [double(sample) for sample in dataset]
    trainer = FlopsTrainer(model.to(dtype), args, train_dataset=dataset, **options)
    trainer.train()
    return trainer


def entropy(outputs, inputs):
    return -(outputs.logits.softmax(-1) * outputs.logits.log_softmax(-1)).sum(-1)


def questions(samples=16):
    batch = tiny_batch("bert", samples)
    batch.pop("labels")
    samples = [{name: value[i] for name, value in batch.items()} for i in range(samples)]
    return [{**sample, "start_positions": 0, "end_positions": 1} for sample in samples]


class Coupled(BertForQuestionAnswering):
    """A model whose loss cannot be split into rows."""

    def forward(self, input_ids=None, start_positions=None, end_positions=None, **kwargs):
        positions = {"start_positions": start_positions, "end_positions": end_positions}
        outputs = super().forward(input_ids, **positions, **kwargs)
        outputs.loss = outputs.loss + 0.1 * outputs.start_logits.std(0, unbiased=False).mean()
        return outputs


def question_answerer(kind=BertForQuestionAnswering):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return adapted("bert", kind(BertConfig(vocab_size=VOCABULARY, **SIZES)))
