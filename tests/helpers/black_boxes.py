"""Tiny black boxes, and trainers that tune them."""

import torch

from hf_flops import BlackBoxPromptModel, FlopsTrainer, FlopsTrainingArguments
from tests.helpers.tiny import VOCABULARY, as_dataset, generator

WORDS = [5, 7]
# How runs on different engines are compared, which round in their own ways: of the last bit of a
# number, Adam can make a whole step and an allocator another whole number of queries.
SMOOTH = {"optim": "sgd", "allocator": "uniform", "learning_rate": 0.5}


def batch(samples=8):
    rng = generator()
    lengths = torch.randint(2, 6, (samples, 1), generator=rng)
    ids = torch.randint(3, VOCABULARY, (samples, 5), generator=rng)
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(5) < lengths).long(),
        "labels": torch.arange(samples) % 2,
    }


def prompted(engine, language_model, **options):
    table = language_model.get_input_embeddings().weight
    return BlackBoxPromptModel(
        engine, table, WORDS, num_virtual_tokens=3, init_tokens=[9, 8], **options
    )


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "queries_per_sample": 8,
        "max_steps": 4,
        "learning_rate": 0.05,
        "perturbation_scale": 1e-2,
        "rows_per_forward": 16,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "pictures": False,
    }
    return FlopsTrainingArguments(output_dir=str(folder), **{**defaults, **options})


def trainer(engine, language_model, folder, **options):
    model = prompted(engine, language_model)
    return FlopsTrainer(model, arguments(folder, **options), train_dataset=as_dataset(batch()))


def tuned(engine, language_model, folder, **options):
    run = trainer(engine, language_model, folder, **{**SMOOTH, **options})
    run.train()
    return run.model.prompt.weight.detach().clone()


class Fails:
    """An engine that does something else on some of its calls."""

    def __init__(self, engine, instead, when=lambda call: True):
        self.engine, self.instead, self.when, self.calls = engine, instead, when, 0

    def __call__(self, *rows):
        self.calls += 1
        return self.instead(*rows) if self.when(self.calls) else self.engine(*rows)


def crash(*rows):
    raise ZeroDivisionError("out of luck")
