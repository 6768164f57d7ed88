"""Trainers of the ecosystem with the mixin: TRL, sentence-transformers, and Seq2SeqTrainer."""

from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import SequentialSampler
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

from hf_flops import FlopsArgumentsMixin, FlopsTrainerMixin
from hf_flops.objectives import CoupledLoss, RowwiseLoss, TappedLoss
from hf_flops.perturbations import SharedNoise
from tests.helpers.coordinates import use_coordinates
from tests.helpers.tiny import SIZES, tiny_model

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
TEXTS = [("a b c", "d e f g"), ("h i", "j"), ("k", "l m n o p"), ("q r s t", "u v")]


def trl():
    return pytest.importorskip("trl", reason="the extra trl is not installed")


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def options(folder, **more):
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_steps": 2,
        "queries_per_sample": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "pictures": False,
        **more,
    }


def forward_only(trainer_class, arguments_class):
    """Return the two classes that it takes."""

    class Trainer(FlopsTrainerMixin, trainer_class):
        pass

    @dataclass
    class Arguments(FlopsArgumentsMixin, arguments_class):
        pass

    return Trainer, Arguments


def lora(task="CAUSAL_LM"):
    return LoraConfig(target_modules=["q_proj", "v_proj"], task_type=task)


def assert_rowwise(trainer, *metrics, kind=RowwiseLoss):
    """Train; the noise must be per row, and the trainer's own metrics in its training log."""
    trainer.train()
    chosen = trainer.session.chosen
    assert type(chosen.objective) is kind
    assert not any(isinstance(part, SharedNoise) for part in chosen.perturbation.parts)
    assert any(
        float(p.detach().abs().sum()) > 0
        for name, p in trainer.model.named_parameters()
        if "lora_B" in name
    )
    first = trainer.state.log_history[0]
    assert set(metrics) <= first.keys()
    assert not any(
        name.startswith("eval_") for entry in trainer.state.log_history for name in entry
    )
    return first


SFT = {
    "default": {},
    "completion only": {"completion_only_loss": True},
    "packing": {"packing": True, "max_length": 12},
    "padding-free": {"padding_free": True, "max_length": None},
}


def sft(trainer_class, args, **own):
    return trainer_class(
        tiny_model("llama"),
        args,
        train_dataset=Dataset.from_list(
            [{"prompt": prompt, "completion": f" {answer}"} for prompt, answer in TEXTS * 2]
        ),
        processing_class=tokenizer(),
        **{"peft_config": lora(), **own},
    )


@pytest.mark.parametrize("name", SFT)
@pytest.mark.filterwarnings("ignore")
def test_sft(name, tmp_path):
    library = trl()
    trainer_class, arguments_class = forward_only(library.SFTTrainer, library.SFTConfig)
    trainer = sft(trainer_class, arguments_class(**options(tmp_path, **SFT[name])))
    first = assert_rowwise(trainer, "entropy", "mean_token_accuracy", "num_tokens")
    assert first["num_tokens"] < 100  # those of the batch, not of its queries


def dpo(trainer_class, args, **own):
    return trainer_class(
        model=tiny_model("llama"),
        args=args,
        train_dataset=Dataset.from_list(
            [
                {"prompt": prompt, "chosen": f" {answer}", "rejected": " x y"}
                for prompt, answer in TEXTS * 2
            ]
        ),
        processing_class=tokenizer(),
        **{"peft_config": lora(), **own},
    )


@pytest.mark.filterwarnings("ignore")
def test_dpo(tmp_path):
    library = trl()
    trainer_class, arguments_class = forward_only(library.DPOTrainer, library.DPOConfig)
    trainer = dpo(trainer_class, arguments_class(**options(tmp_path)))
    assert_rowwise(trainer, "rewards/chosen", "rewards/margins", "logps/rejected")


def kto(trainer_class, args, **own):
    return trainer_class(
        model=tiny_model("llama"),
        args=args,
        train_dataset=Dataset.from_list(
            [
                {"prompt": prompt, "completion": f" {answer}", "label": i % 2 == 0}
                for i, (prompt, answer) in enumerate(TEXTS * 2)
            ]
        ),
        processing_class=tokenizer(),
        **{"peft_config": lora(), **own},
    )


class Gradient(TrainerCallback):
    """Keeps the gradient of the first optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **options):
        own = [p for p in model.parameters() if p.requires_grad]
        self.value = torch.cat([p.grad.flatten().clone() for p in own])


@pytest.mark.parametrize("micro", [4, 2])
@pytest.mark.parametrize(("make", "kind"), [(sft, "SFT"), (dpo, "DPO"), (kto, "KTO")])
@pytest.mark.filterwarnings("ignore")
def test_the_gradient_is_that_of_trl(make, kind, micro, tmp_path, monkeypatch):
    library = trl()
    stock = getattr(library, f"{kind}Trainer"), getattr(library, f"{kind}Config")
    small = LoraConfig(r=1, target_modules=["v_proj"], layers_to_transform=[0])
    small.task_type = "CAUSAL_LM"
    step = {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": 4 // micro,
        "max_steps": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
    }
    exact = {
        "estimator": "antithetic",
        "allocator": "uniform",
        "control_variate": "none",
        "perturbation": "rowwise",
        "perturbation_scale": 0.003,
        "queries_per_sample": 64 + int(kind == "KTO"),  # whose clean rows always run
    }
    found = []
    for (trainer_class, arguments_class), own in ((stock, {}), (forward_only(*stock), exact)):
        if own:
            use_coordinates(monkeypatch)
        given = {**options(tmp_path), **step, **own}
        if not own:
            del given["pictures"], given["queries_per_sample"]
        trainer = make(trainer_class, arguments_class(**given), peft_config=small)
        values = torch.Generator().manual_seed(4)
        for parameter in (p for p in trainer.model.parameters() if p.requires_grad):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=values))
        gradient = Gradient()
        trainer.add_callback(gradient)
        trainer.train()
        found.append(gradient.value)
        if kind == "KTO":
            assert trainer.state.log_history[0]["kl"] > 0  # it is clamped, and has no effect at 0
    assert len(found[0]) == 32  # a pair of rows for each number
    assert torch.cosine_similarity(found[1], found[0], dim=0) > 0.99
    assert float(found[1].norm() / found[0].norm()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("loss", ["apo_zero_unpaired", "kto"])
@pytest.mark.filterwarnings("ignore")
def test_kto(loss, tmp_path):
    library = trl()
    trainer_class, arguments_class = forward_only(library.KTOTrainer, library.KTOConfig)
    trainer = kto(trainer_class, arguments_class(**options(tmp_path, loss_type=loss)))
    kind = CoupledLoss if loss == "kto" else RowwiseLoss
    assert_rowwise(trainer, "rewards/chosen", "kl", kind=kind)


@pytest.mark.filterwarnings("ignore")
def test_reward(tmp_path):
    library = trl()
    trainer_class, arguments_class = forward_only(library.RewardTrainer, library.RewardConfig)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=40, num_labels=1, pad_token_id=0, **SIZES)
        model = LlamaForSequenceClassification(config)
    trainer = trainer_class(
        model=model,
        args=arguments_class(**options(tmp_path)),
        train_dataset=Dataset.from_list(
            [
                {"chosen": f"{prompt} {answer}", "rejected": f"{prompt} x y"}
                for prompt, answer in TEXTS * 2
            ]
        ),
        processing_class=tokenizer(),
        peft_config=lora("SEQ_CLS"),
    )
    assert_rowwise(trainer, "accuracy", "margin")


def test_seq2seq_with_label_smoothing(tmp_path):
    trainer_class, arguments_class = forward_only(Seq2SeqTrainer, Seq2SeqTrainingArguments)
    words, model = tokenizer(), tiny_model("t5")
    data = [
        {"input_ids": words(prompt)["input_ids"], "labels": words(answer)["input_ids"]}
        for prompt, answer in TEXTS
    ]
    trainer = trainer_class(
        model,
        arguments_class(**options(tmp_path, label_smoothing_factor=0.1)),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(words, model),
        peft_config=LoraConfig(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"),
    )
    assert_rowwise(trainer, "loss")


def library_of_sentences():
    return pytest.importorskip("sentence_transformers", reason="the extra trl is not installed")


def saved(model, folder):
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def bert(kind, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(BertConfig(vocab_size=40, pad_token_id=0, **SIZES, **options))


def biases(model):
    """Train biases only, all of which have rules."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("dense.bias") and "pooler" not in name)
    return model


@pytest.mark.parametrize(
    ("loss", "columns", "objective"),
    [
        ("CosineSimilarityLoss", ("sentence1", "sentence2", "score"), TappedLoss),
        ("TripletLoss", ("anchor", "positive", "negative"), RowwiseLoss),
        ("MultipleNegativesRankingLoss", ("anchor", "positive"), CoupledLoss),
    ],
    ids=["CosineSimilarityLoss", "TripletLoss", "MultipleNegativesRankingLoss"],
)
@pytest.mark.filterwarnings("ignore")
def test_sentence_transformers(loss, columns, objective, tmp_path):
    library = library_of_sentences()
    trainer_class, arguments_class = forward_only(
        library.SentenceTransformerTrainer, library.SentenceTransformerTrainingArguments
    )
    model = library.SentenceTransformer(saved(bert(BertModel), tmp_path / "base"), device="cpu")
    values = {"score": [0.1, 0.9, 0.3, 0.5] * 2, "negative": ["x y", "z", "w w", "v"] * 2}
    texts = {name: [pair[i % 2] for pair in TEXTS * 2] for i, name in enumerate(columns)}
    trainer = trainer_class(
        model=biases(model),
        args=arguments_class(**options(tmp_path)),
        train_dataset=Dataset.from_dict(
            {**texts, **{k: values[k] for k in columns if k in values}}
        ),
        loss=getattr(library.sentence_transformer.losses, loss)(model),
    )
    trainer.train()
    chosen = trainer.session.chosen
    assert type(chosen.objective) is objective
    assert not any(isinstance(part, SharedNoise) for part in chosen.perturbation.parts)


# ways to couple the texts of a batch: the default, both directions, hard negatives
RANKINGS = {
    "default": ({}, ("anchor", "positive")),
    "symmetric": (
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        ("anchor", "positive"),
    ),
    "all directions, negatives": (
        {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
        ("anchor", "positive", "negative"),
    ),
}


@pytest.mark.parametrize("micro", [4, 2])
@pytest.mark.parametrize("name", RANKINGS)
@pytest.mark.filterwarnings("ignore")
def test_the_gradient_of_a_ranking_loss_is_that_of_autograd(name, micro, tmp_path, monkeypatch):
    library, (settings, columns) = library_of_sentences(), RANKINGS[name]
    trainer_class, arguments_class = forward_only(
        library.SentenceTransformerTrainer, library.SentenceTransformerTrainingArguments
    )
    model = library.SentenceTransformer(saved(bert(BertModel), tmp_path / "base"), device="cpu")
    model = model.double()
    for other, parameter in model.named_parameters():
        parameter.requires_grad_("layer.0.attention.output.dense.bias" in other)
    texts = {
        "anchor": [a for a, _ in TEXTS],
        "positive": [b for _, b in TEXTS],
        "negative": ["x y", "z", "w w", "v"],
    }
    loss = library.sentence_transformer.losses.MultipleNegativesRankingLoss(model, **settings)
    own = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.zeros(own[0].numel(), dtype=torch.float64)
    for start in range(0, 4, micro):
        batch = [model.preprocess(texts[name][start : start + micro]) for name in columns]
        (gradient,) = torch.autograd.grad(loss(batch, None), own)
        wanted += gradient / (4 // micro)
    use_coordinates(monkeypatch)
    trainer = trainer_class(
        model=model,
        args=arguments_class(
            **options(
                tmp_path,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=4 // micro,
                max_steps=1,
                learning_rate=0.0,
                max_grad_norm=0.0,
                perturbation="rowwise",
                allocator="uniform",
                estimator="antithetic",
                control_variate="none",
                queries_per_sample=2 * len(wanted) + 1,
            )
        ),
        train_dataset=Dataset.from_dict({name: texts[name] for name in columns}),
        loss=loss,
    )
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
    keep = Gradient()
    trainer.add_callback(keep)
    trainer.train()
    assert type(trainer.session.chosen.objective) is CoupledLoss
    assert torch.cosine_similarity(keep.value, wanted, dim=0) > 0.999
    assert float(keep.value.norm() / wanted.norm()) == pytest.approx(1, abs=0.01)


@pytest.mark.filterwarnings("ignore")
def test_cross_encoder(tmp_path):
    library = library_of_sentences()
    trainer_class, arguments_class = forward_only(
        library.CrossEncoderTrainer, library.CrossEncoderTrainingArguments
    )
    base = saved(bert(BertForSequenceClassification, num_labels=1), tmp_path / "base")
    model = library.CrossEncoder(base, device="cpu")
    trainer = trainer_class(
        model=biases(model),
        args=arguments_class(**options(tmp_path)),
        train_dataset=Dataset.from_dict(
            {
                "query": [pair[0] for pair in TEXTS * 2],
                "answer": [pair[1] for pair in TEXTS * 2],
                "label": [1.0, 0.0, 1.0, 1.0] * 2,
            }
        ),
        loss=library.cross_encoder.losses.BinaryCrossEntropyLoss(model),
    )
    trainer.train()
    chosen = trainer.session.chosen
    assert chosen.objective.per_row
    assert not any(isinstance(part, SharedNoise) for part in chosen.perturbation.parts)
