"""Trainers of the ecosystem with the mixin: TRL, sentence-transformers, and Seq2SeqTrainer."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
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


@pytest.mark.parametrize("loss", ["apo_zero_unpaired", "kto"])
@pytest.mark.filterwarnings("ignore")
def test_kto(loss, tmp_path):
    library = trl()
    trainer_class, arguments_class = forward_only(library.KTOTrainer, library.KTOConfig)
    trainer = kto(trainer_class, arguments_class(**options(tmp_path, loss_type=loss)))
    kind = CoupledLoss if loss == "kto" else RowwiseLoss
    assert_rowwise(trainer, "rewards/chosen", "kl", kind=kind)


def reward(trainer_class, args, **own):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=40, num_labels=1, pad_token_id=0, **SIZES)
        model = LlamaForSequenceClassification(config)
    return trainer_class(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(
            [
                {"chosen": f"{prompt} {answer}", "rejected": f"{prompt} x y"}
                for prompt, answer in TEXTS * 2
            ]
        ),
        processing_class=tokenizer(),
        **{"peft_config": lora("SEQ_CLS"), **own},
    )


@pytest.mark.filterwarnings("ignore")
def test_reward(tmp_path):
    library = trl()
    trainer_class, arguments_class = forward_only(library.RewardTrainer, library.RewardConfig)
    trainer = reward(trainer_class, arguments_class(**options(tmp_path)))
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
        return kind(
            BertConfig(
                vocab_size=40,
                pad_token_id=0,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                **SIZES,
                **options,
            )
        )


def biases(model):
    """Train biases only, all of which have rules."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("dense.bias") and "pooler" not in name)
    return model


LOSSES = {
    "CosineSimilarityLoss": (("sentence1", "sentence2", "score"), TappedLoss),
    "TripletLoss": (("anchor", "positive", "negative"), RowwiseLoss),
    "MultipleNegativesRankingLoss": (("anchor", "positive"), CoupledLoss),
}


def sentences(trainer_class, args, loss, columns=(), **settings):
    library = library_of_sentences()
    base = saved(bert(BertModel), f"{args.output_dir}/base")
    model = library.SentenceTransformer(base, device="cpu")
    texts = {name: [pair[i % 2] for pair in TEXTS * 2] for i, name in enumerate(columns)}
    values = {"score": [0.1, 0.9, 0.3, 0.5] * 2, "negative": ["x y", "z", "w w", "v"] * 2}
    return trainer_class(
        model=biases(model),
        args=args,
        train_dataset=Dataset.from_dict(
            {**texts, **{name: values[name] for name in columns if name in values}}
        ),
        loss=getattr(library.sentence_transformer.losses, loss)(model, **settings),
    )


def pairs(trainer_class, args):
    library = library_of_sentences()
    base = saved(bert(BertForSequenceClassification, num_labels=1), f"{args.output_dir}/base")
    model = library.CrossEncoder(base, device="cpu")
    return trainer_class(
        model=biases(model),
        args=args,
        train_dataset=Dataset.from_dict(
            {
                "query": [pair[0] for pair in TEXTS * 2],
                "answer": [pair[1] for pair in TEXTS * 2],
                "label": [1.0, 0.0, 1.0, 1.0] * 2,
            }
        ),
        loss=library.cross_encoder.losses.BinaryCrossEntropyLoss(model),
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.filterwarnings("ignore")
def test_sentence_transformers(loss, tmp_path):
    library, (columns, objective) = library_of_sentences(), LOSSES[loss]
    trainer_class, arguments_class = forward_only(
        library.SentenceTransformerTrainer, library.SentenceTransformerTrainingArguments
    )
    trainer = sentences(trainer_class, arguments_class(**options(tmp_path)), loss, columns)
    trainer.train()
    chosen = trainer.session.chosen
    assert type(chosen.objective) is objective
    assert not any(isinstance(part, SharedNoise) for part in chosen.perturbation.parts)


@pytest.mark.filterwarnings("ignore")
def test_cross_encoder(tmp_path):
    library = library_of_sentences()
    trainer_class, arguments_class = forward_only(
        library.CrossEncoderTrainer, library.CrossEncoderTrainingArguments
    )
    trainer = pairs(trainer_class, arguments_class(**options(tmp_path)))
    trainer.train()
    chosen = trainer.session.chosen
    assert chosen.objective.per_row
    assert not any(isinstance(part, SharedNoise) for part in chosen.perturbation.parts)


# ways to couple the texts of a batch: both directions, hard negatives, detached scores
RANKINGS = {
    "symmetric": (
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        ("anchor", "positive"),
    ),
    "all directions": (
        {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
        ("anchor", "positive", "negative"),
    ),
    "hard": (
        {"hardness_mode": "in_batch_negatives", "hardness_strength": 5.0},
        ("anchor", "positive"),
    ),
}
# a trainer and the class of its arguments, the function that makes it, arguments
SFT_CLASSES, TEXT_CLASSES = (
    ("SFTTrainer", "SFTConfig"),
    ("SentenceTransformerTrainer", "SentenceTransformerTrainingArguments"),
)
GRADIENTS = {
    **{f"SFT {name}": (trl, SFT_CLASSES, sft, given, RowwiseLoss) for name, given in SFT.items()},
    "DPO": (trl, ("DPOTrainer", "DPOConfig"), dpo, {}, RowwiseLoss),
    "KTO": (trl, ("KTOTrainer", "KTOConfig"), kto, {}, CoupledLoss),
    "Reward": (trl, ("RewardTrainer", "RewardConfig"), reward, {}, RowwiseLoss),
    **{
        name: (
            library_of_sentences,
            TEXT_CLASSES,
            partial(sentences, loss=name, columns=columns),
            {},
            kind,
        )
        for name, (columns, kind) in LOSSES.items()
    },
    **{
        f"MultipleNegativesRankingLoss {name}": (
            library_of_sentences,
            TEXT_CLASSES,
            partial(sentences, loss="MultipleNegativesRankingLoss", columns=columns, **settings),
            {},
            CoupledLoss,
        )
        for name, (settings, columns) in RANKINGS.items()
    },
    "CrossEncoder": (
        library_of_sentences,
        ("CrossEncoderTrainer", "CrossEncoderTrainingArguments"),
        pairs,
        {},
        TappedLoss,
    ),
}


class Gradient(TrainerCallback):
    """Keeps the gradient of the first optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **options):
        own = [p for p in model.parameters() if p.requires_grad]
        self.value = torch.cat([p.grad.flatten().clone() for p in own])


def small(trainer):
    """Train few tensors in 64 bits, from random values of an adapter."""
    values = torch.Generator().manual_seed(4)
    for name, parameter in trainer.model.double().named_parameters():
        if "lora" in name and parameter.requires_grad:  # not of a reference
            noise = torch.randn(parameter.shape, generator=values, dtype=torch.float64)
            parameter.data.copy_(0.3 * noise)
        if "dense.bias" in name:
            parameter.requires_grad_("layer.0.attention.output" in name)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("micro", [4, 2])
@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.filterwarnings("ignore")
def test_the_gradient_is_that_of_the_stock_trainer(name, micro, tmp_path, monkeypatch):
    library, names, make, own, kind = GRADIENTS[name]
    stock = [getattr(library(), each) for each in names]
    given = {
        **options(tmp_path),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": 4 // micro,
        "max_steps": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        **own,
    }
    del given["pictures"], given["queries_per_sample"]
    adapter = {}
    if library is trl:
        config = LoraConfig(r=1, target_modules=["v_proj"], layers_to_transform=[0])
        config.task_type = "SEQ_CLS" if name == "Reward" else "CAUSAL_LM"
        adapter = {"peft_config": config}
    gradients = [Gradient(), Gradient()]
    trainer = small(make(stock[0], stock[1](**given), **adapter))
    trainer.add_callback(gradients[0])
    trainer.train()
    wanted = gradients[0].value
    use_coordinates(monkeypatch)
    trainer_class, arguments_class = forward_only(*stock)
    exact = {
        "estimator": "antithetic",
        "allocator": "uniform",
        "control_variate": "none",
        "perturbation": "rowwise",
        "perturbation_scale": 0.001,
        "lora_parts": "both",
        # a pair of rows for each number; clean rows count where they always run
        "queries_per_sample": 2 * len(wanted) + int(kind is CoupledLoss),
        "pictures": False,
    }
    trainer = small(make(trainer_class, arguments_class(**given, **exact), **adapter))
    trainer.add_callback(gradients[1])
    trainer.train()
    assert type(trainer.session.chosen.objective) is kind
    found = gradients[1].value
    assert found.dtype == wanted.dtype == torch.float64
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.999
    assert float(found.norm() / wanted.norm()) == pytest.approx(1, abs=0.01)
    if name == "KTO":
        assert trainer.state.log_history[0]["kl"] > 0  # it is clamped, and has no effect at 0
