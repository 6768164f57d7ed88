"""The alignment recipe on tiny models: two encoders, CLIP and SigLIP, every adapter and method, the
protocol's splits.
"""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from hf_flops import ConfigurationError
from recipes import alignment
from recipes.alignment_methods import METHODS
from recipes.alignment_report import MEASURES
from recipes.images import load_images
from recipes.pairs import (
    DIGITS,
    HELD_OUT_TEMPLATES,
    TRAINED_TEMPLATES,
    PairCollator,
    PixelRows,
    Sentences,
    class_words,
    scores,
)
from recipes.two_towers import Pooled, adapted, load_processor, trained_context
from tests.helpers.pairs import pair_model
from tests.helpers.tiny import SIZES, VOCABULARY


def tiny_tokenizer():
    words = {
        word
        for template in TRAINED_TEMPLATES
        for word in template.replace(".", " .").replace(",", " ,").split()
    }
    names = {"[BOS]": 0, "[PAD]": 1, "[UNK]": 2, "[EOS]": VOCABULARY - 1}
    vocabulary = names | {word: 3 + i for i, word in enumerate(sorted(words)[: VOCABULARY - 14])}
    vocabulary |= {word: VOCABULARY - 11 + i for i, word in enumerate(DIGITS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[BOS]", 0), ("[EOS]", VOCABULARY - 1)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="[BOS]",
        eos_token="[EOS]",
        pad_token="[PAD]",
        unk_token="[UNK]",
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Save tiny models as their users find them on the Hub."""
    root = tmp_path_factory.mktemp("models")
    sizes = {**SIZES, "initializer_range": 0.3}
    texts = {"vocab_size": VOCABULARY, "max_position_embeddings": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(root / "vit")
        BertModel(BertConfig(**texts, **sizes)).save_pretrained(root / "bert")
    for kind in ("clip", "siglip"):
        pair_model(kind, positions=16).save_pretrained(root / kind)
    for name in ("bert", "clip", "siglip"):
        tiny_tokenizer().save_pretrained(root / name)
    for name in ("vit", "clip", "siglip"):
        ViTImageProcessorPil(size=8, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
            root / name
        )
    return root


def recipe(folder, *options):
    common = [
        "--dataset",
        "digits",
        "--shots",
        "2",
        "--test_images",
        "40",
        "--num_train_epochs",
        "1",
    ]
    common += ["--disable_tqdm", "True", "--per_device_train_batch_size", "10"]
    return alignment.main([*common, "--output_dir", str(folder), *options])


def test_two_encoders_by_every_method(folders, tmp_path, drawn):
    towers = [
        "--vision_model",
        str(folders / "vit"),
        "--text_model",
        str(folders / "bert"),
        "--projection_dim",
        "6",
    ]
    outcomes = recipe(tmp_path, *towers, "--compare", "mezo", "spsa-gc", "backprop")
    assert [outcome.method for outcome in outcomes] == METHODS
    assert len({outcome.parameters for outcome in outcomes}) == 1
    assert len({json.dumps(outcome.before) for outcome in outcomes}) == 1
    rows = {outcome.method: outcome.rows for outcome in outcomes}
    assert rows["backprop"] == 20
    logs = {
        method: json.loads((tmp_path / method / "trainer_state.json").read_text())["log_history"]
        for method in rows
    }
    checks = {name: max(entry.get("check_rows", 0) for entry in log) for name, log in logs.items()}
    assert checks["flops"] > 0
    assert rows["flops"] - checks["flops"] <= 160
    assert [rows[name] - checks[name] for name in ("mezo", "spsa-gc")] == [160, 160]
    for method in METHODS:
        card = (tmp_path / method / "README.md").read_text()
        assert "ore information" not in card.replace("-", " ").lower()
        assert "## Load it" in card
        assert ("## Forward-only training" in card) == (method != "backprop")
    assert "| flops | all |" in (tmp_path / "report.md").read_text()
    measures, *examples = drawn["report.png"].axes
    shown = {bars.get_label(): [bar.get_height() for bar in bars] for bars in measures.containers}
    after = {outcome.method: outcome.after["all"] for outcome in outcomes}
    after = {"untrained": outcomes[0].before["all"], **after}
    assert shown == {
        name: [values[measure] for measure in MEASURES] for name, values in after.items()
    }
    assert [len(axes.images) for axes in examples] == [1] * 10  # one of each digit
    moments = [[text.get_text()[:-2] for text in axes.texts[::2]] for axes in examples]
    assert moments == [["before", "after"]] * 10
    assert (tmp_path / "report.png").is_file()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("clip", ["--adapter", "lora", "--towers", "both", "--classes", "base"]),
        ("clip", ["--adapter", "context"]),
        (
            "clip",
            ["--adapter", "border", "--prompt_size", "1", "--classes", "base", "--method", "mezo"],
        ),
        ("siglip", ["--adapter", "tokens", "--loss", "pairs"]),
    ],
)
def test_models_with_two_towers_by_every_adapter(kind, options, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.alignment_report.draw", lambda *args: None)
    (outcome,) = recipe(tmp_path, "--model", str(folders / kind), *options)
    assert set(outcome.after) == ({"base", "new"} if "base" in options else {"all"})
    assert outcome.parameters > 0
    if "base" in options:
        assert "harmonic mean of base and new" in (tmp_path / "report.md").read_text()


def test_a_context_is_tokens_after_the_start(folders):
    tokenizer = tiny_tokenizer()
    context = trained_context(tokenizer, 3)
    assert len(set(context)) == 3
    assert set(context).isdisjoint(tokenizer.all_special_ids)
    tokens = Sentences(["one", "two"], tokenizer, context).tokens(
        ["this is a one", "this is a two ."]
    )
    assert torch.equal(tokens["input_ids"][:, 1:4], torch.tensor(context).expand(2, -1))
    assert tokens["attention_mask"].sum(1).tolist() == [9, 10]


def test_a_missing_image_processor_is_one_clear_sentence(folders):
    with pytest.raises(ValueError, match="has no image processor"):
        load_processor(str(folders / "bert"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model": "/nowhere"}, "--model /nowhere cannot be used: .*'/nowhere'"),
        ({"vision_model": "/nowhere"}, "--vision_model /nowhere cannot be used"),
        (
            {"image_processor": "/nowhere", "vision_model": "vit"},
            "--image_processor /nowhere cannot be used",
        ),
        ({"text_model": "/nowhere", "vision_model": "vit"}, "--text_model /nowhere cannot be used"),
        ({"text_model": "vit", "vision_model": "bert"}, "bert' has no image processor"),
        ({"model": "bert", "image_processor": "vit"}, "bert' has no two towers"),
    ],
)
def test_models_that_cannot_be_used_are_refused_in_a_sentence(options, match, folders):
    given = {
        name: value if value[0] == "/" else str(folders / value) for name, value in options.items()
    }
    with pytest.raises(ConfigurationError, match=match) as refused:
        alignment.load_task(alignment.RecipeArguments(dataset="digits", **given), seed=0)
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)


def test_unknown_kinds_fall_into_no_other(capsys):
    for option in ("--classes", "--loss", "--towers"):
        with pytest.raises(SystemExit):
            alignment.parse([option, "foo"])
        assert "invalid choice: 'foo'" in capsys.readouterr().err
    with pytest.raises(
        ConfigurationError, match="The adapter 'foo' is unknown: choose among lora, border"
    ):
        adapted(None, "foo", projections=False)
    with pytest.raises(
        ConfigurationError, match="The tower 'foo' is unknown: choose among image, text, both"
    ):
        adapted(None, "lora", projections=False, towers="foo")
    with pytest.raises(
        ConfigurationError, match="The loss 'foo' is unknown: choose among pairs, classes"
    ):
        PairCollator(Sentences([], None), [], "foo")


def test_a_frozen_text_encoder_reads_a_sentence_once():
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=VOCABULARY, **SIZES)).eval()
    reads = []
    bert.register_forward_pre_hook(
        lambda module, args, kwargs: reads.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    pooled = Pooled(bert.requires_grad_(False), "mean")
    ids, mask = (
        torch.randint(3, VOCABULARY, (3, 5)),
        torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [1] * 5]),
    )
    first = pooled(input_ids=ids, attention_mask=mask).pooler_output
    second = pooled(input_ids=ids[[2, 0]], attention_mask=mask[[2, 0]]).pooler_output
    assert reads == [3]
    assert torch.equal(second, first[[2, 0]])
    hidden = bert(input_ids=ids[:1, :3]).last_hidden_state
    torch.testing.assert_close(first[:1], hidden.mean(1), rtol=1e-4, atol=1e-4)


def test_templates_of_training_and_test_are_different_and_a_batch_has_one():
    assert set(TRAINED_TEMPLATES).isdisjoint(HELD_OUT_TEMPLATES)
    task = load_images("digits", every_class=True)
    assert class_words(task)[:3] == ["zero", "one", "two"]
    sentences = Sentences(class_words(task), tiny_tokenizer())
    data = PixelRows(torch.zeros(4, 3, 8, 8), torch.arange(4) % 2)
    rows = [data[i] for i in range(4)]
    batch = PairCollator(sentences, [0, 1])(rows)
    assert len(torch.unique(batch["input_ids"], dim=0)) == 2
    assert batch["return_loss"] is True
    batch = PairCollator(sentences, [1, 0], "classes")(rows)
    assert batch["labels"].tolist() == [1, 0, 1, 0]
    assert len(batch["input_ids"]) == 2


def test_scores_are_those_of_counting(monkeypatch):
    """Three classes, images and sentences along the axes: all right but one image, which looks like
    another class.
    """
    axes = torch.eye(3)
    images, labels = axes[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 0])
    monkeypatch.setattr(
        "recipes.pairs.embed", lambda *args: (images, axes.repeat(len(HELD_OUT_TEMPLATES), 1))
    )
    found = scores(None, PixelRows(images, labels), Sentences(["a", "b", "c"], None), [0, 1, 2])
    assert found["accuracy"] == found["image_to_text_1"] == 0.75
    assert found["text_to_image_5"] == 1.0
