"""The prompt-tuning recipe: templates, label words, adapters, and a whole run with a tiny model."""

import json
import random
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

from hf_flops import ConfigurationError, FlopsTrainer, LabelHeadModel, SuffixPromptModel
from hf_flops.prompts.suffix_prompt import CONFIG_FILE
from recipes import prompt_tuning, prompts, sums
from recipes.prompts import Template, WordClassifier, adapted, label_tokens, load_texts
from tests.helpers.tiny import generator, tiny_model
from tests.helpers.vllm import FakeVllm

WORDS = [
    "<pad>",
    "<unk>",
    "user",
    "says",
    "It",
    "was",
    "terrible",
    "great",
    "good",
    "bad",
    "a",
    "film",
    "very",
    "so",
    "dull",
]
CHAT = "{% for m in messages %}{{ m.role }} says {{ m.content }} says {% endfor %}"


def tokenizer(chat=CHAT):
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    built = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", padding_side="right"
    )
    built.chat_template = chat
    return built


def reviews(domain="movieReviewSnippets", count=80):
    draw = random.Random(0)
    rows = []
    for i in range(count):
        filler = draw.choices(["a", "film", "very", "so"], k=draw.randint(1, 5))
        rows.append((" ".join([*filler, "good" if i % 2 else "bad"]), i % 2))
    return rows


def language_model(*unused):
    return tiny_model("llama", num_hidden_layers=1), tokenizer()


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(prompts, "sentences", reviews)
    monkeypatch.setattr(prompts, "load_model", language_model)


def words_of(ids):
    return [WORDS[i] for i in ids]


def test_templates_put_texts_and_cut_nothing_but_them():
    plain = Template(tokenizer(), "so {text} It was", most=2)
    assert words_of(plain.head("a very good film")) == ["so", "a", "very"]
    assert words_of(plain.tail) == ["It", "was"]
    (row,) = plain.rows([("a film", 1)], tail=True)
    assert (words_of(row["input_ids"]), row["labels"]) == (["so", "a", "film", "It", "was"], 1)
    chat = Template(tokenizer(), "so {text} It was", most=9, chat=True)
    assert words_of(chat.head("a film") + chat.tail) == [
        "user",
        "says",
        "so",
        "a",
        "film",
        "says",
        "It",
        "was",
    ]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Template(tokenizer(), "It was", 9), "must have {text} in it, once"),
        (lambda: Template(tokenizer(), "{text} {text}", 9), "must have {text} in it, once"),
        (
            lambda: Template(tokenizer(chat=None), "{text}", 9, chat=True),
            "needs a model whose tokenizer has a chat template",
        ),
        (lambda: label_tokens(tokenizer(), ["great"], 2), "names 1 words"),
        (
            lambda: label_tokens(tokenizer(), ["great", "great"], 2),
            "'great' stands for two classes",
        ),
        (lambda: label_tokens(tokenizer(), ["great", "very bad"], 2), "'very bad' is 2 tokens"),
        (lambda: label_tokens(tokenizer(), ["great", ""], 2), "'' is 0 tokens"),
    ],
)
def test_what_cannot_work_is_refused(make, match):
    with pytest.raises(SystemExit, match=match):
        make()


def test_few_texts_per_class_and_held_out_ones(tiny):
    sizes = {"validation": 8, "test": 12}
    few, other = (load_texts("movies", per_class=3, seed=seed, **sizes) for seed in (0, 1))
    whole = load_texts("movies", **sizes)
    assert [label for _, label in few.train] == [0, 0, 0, 1, 1, 1]
    assert few.train != other.train
    assert (
        (few.test, few.validation)
        == (other.test, other.validation)
        == (whole.test, whole.validation)
    )
    assert (len(whole.train), len(whole.validation), len(whole.test), whole.classes) == (
        60,
        8,
        12,
        2,
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_the_answer_is_read_after_the_last_token(kind):
    model, words = tiny_model("llama"), tokenizer()
    template = Template(words, "{text} It was", most=9)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = adapted(
            kind, model, template, [6, 7], virtual_tokens=2, init_text="a film", lora_rank=2
        ).eval()
    rows = template.rows(reviews()[:5], tail=True)
    batch = DataCollatorWithPadding(words)([{"input_ids": row["input_ids"]} for row in rows])
    found = made(batch["input_ids"], batch["attention_mask"]).logits
    for row, logits in zip(rows, found, strict=True):
        alone = made.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, -1, [6, 7]]
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)


def test_the_loss_of_words_is_that_of_a_classifier():
    classifier = WordClassifier(tiny_model("llama"), [6, 7])
    ids, labels = torch.randint(3, 14, (3, 4), generator=generator()), torch.tensor([0, 1, 1])
    outputs = classifier(ids, torch.ones_like(ids), labels)
    expected = torch.nn.functional.cross_entropy(outputs.logits, labels)
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(
        classifier(ids, torch.ones_like(ids), labels, num_items_in_batch=6).loss, expected / 2
    )


def test_prompts_start_as_texts():
    model, template = tiny_model("llama"), Template(tokenizer(), "{text} It was", most=9)
    embeddings = model.get_input_embeddings().weight.detach().clone()
    options = {"virtual_tokens": 3, "init_text": "so very good", "lora_rank": 2}
    suffix = adapted("suffix", model, template, [6, 7], **options)
    assert suffix.prompt.weight.equal(
        embeddings[[WORDS.index(word) for word in ("so", "very", "good")]]
    )
    prompt = (
        adapted("prompt", model, template, [6, 7], **options)
        .model.prompt_encoder["default"]
        .embedding.weight
    )
    assert prompt.equal(embeddings[[WORDS.index(word) for word in ("so", "very", "good")]])


@pytest.mark.parametrize("adapter", ["suffix", "prompt"])
def test_a_run_leaves_a_report_a_picture_and_adapters(adapter, tiny, tmp_path, capsys, drawn):
    options = (
        f"--adapter {adapter} --virtual_tokens 3 --max_steps 2 --eval_steps 1 "
        "--queries_per_sample 4 --compare backprop"
    )
    options += (
        " --per_device_train_batch_size 4 --validation_texts 8 --test_texts 12 --use_cpu True "
        "--disable_tqdm True"
    )
    outcomes = prompt_tuning.main(
        [*options.split(), "--label_words", "terrible", "great", "--output_dir", str(tmp_path)]
    )
    assert [outcome.method for outcome in outcomes] == ["flops", "backprop"]
    assert [outcome.steps for outcome in outcomes] == [2, 2]
    assert {outcome.parameters for outcome in outcomes} == {3 * 16 + 2 * 16 + 2}  # with a head
    assert outcomes[0].before == outcomes[1].before
    assert outcomes[0].rows >= 2 * 4 * 4
    assert outcomes[1].rows == 2 * 4
    assert all(outcome.tokens > 3 * outcome.rows for outcome in outcomes)
    report = (tmp_path / "report.md").read_text()
    assert report.splitlines()[2] in capsys.readouterr().out
    curves = [
        outcome["curve"]
        for outcome in json.loads((tmp_path / "results.json").read_text())["outcomes"]
    ]
    assert [len(curve) for curve in curves] == [2, 2]
    (axes,) = drawn["report.png"].axes
    assert [line.get_xydata().tolist() for line in axes.lines[:2]] == curves
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "flops",
        "backprop",
        "untrained adapter",
    ]
    assert (tmp_path / "report.png").is_file()
    name = CONFIG_FILE if adapter == "suffix" else "adapter_config.json"
    assert (tmp_path / "flops" / name).is_file()
    assert (tmp_path / "backprop" / name).is_file()


@pytest.mark.parametrize("adapter", ["suffix", "lora"])
def test_a_label_head_stands_beside_the_words_in_the_report(adapter, tiny, tmp_path):
    options = (
        f"--adapter {adapter} --label_head True --virtual_tokens 3 --max_steps 2 --eval_steps 2 "
        "--queries_per_sample 4 --per_device_train_batch_size 4 --validation_texts 8 "
        "--test_texts 12 --use_cpu True --disable_tqdm True"
    )
    own = ["--label_words", "terrible", "great", "--output_dir", str(tmp_path)]
    outcomes = prompt_tuning.main([*options.split(), *own])
    assert [outcome.method for outcome in outcomes] == ["flops", "flops-words"]
    head, words = outcomes
    assert head.parameters == words.parameters + 2 * 16 + 2
    assert (head.before, head.start) == (words.before, words.start)
    report = (tmp_path / "report.md").read_text()
    assert "flops-words |" in report
    base, tokens = language_model()
    if adapter == "suffix":
        loaded = SuffixPromptModel.from_pretrained(base, tmp_path / "flops")
    else:
        loaded = LabelHeadModel.from_pretrained(base, tmp_path / "flops")
    task = load_texts("movies", validation=8, test=12)
    template = Template(tokens, "{text} It was", 48)
    right = 0
    for row in template.rows(task.test, tail=adapter != "suffix"):
        scores = loaded.eval()(torch.tensor([row["input_ids"]])).logits
        right += int(scores.argmax()) == row["labels"]
    assert right / 12 == head.after


@pytest.mark.parametrize("objective", ["accuracy", "macro_f1"])
def test_a_run_for_a_metric_itself(objective, tiny, tmp_path):
    options = (
        f"--objective {objective} --estimator antithetic --max_steps 1 "
        "--per_device_train_batch_size 4"
    )
    options += (
        " --eval_strategy no --validation_texts 8 --test_texts 12 --use_cpu True --disable_tqdm "
        "True --per_class 4"
    )
    (outcome,) = prompt_tuning.main(
        [*options.split(), "--label_words", "terrible", "great", "--output_dir", str(tmp_path)]
    )
    assert outcome.steps == 1
    assert outcome.parameters == 8 * 16  # a metric has no gradient to solve a head with
    low, high = outcome.interval
    assert 0 <= low <= outcome.after <= high <= 1


@pytest.mark.parametrize("adapter", ["prompt", "suffix"])
def test_a_black_box_is_tuned_and_what_it_begins_with_is_measured_once(
    adapter, tiny, tmp_path, capsys
):
    options = (
        f"--adapter {adapter} --engine torch --virtual_tokens 2 --max_steps 1 "
        "--queries_per_sample 4 --eval_strategy no"
    )
    options += (
        " --per_device_train_batch_size 4 --validation_texts 8 --test_texts 12 --use_cpu True "
        "--disable_tqdm True"
    )
    options = [
        *options.split(),
        "--label_words",
        "terrible",
        "great",
        "--output_dir",
        str(tmp_path),
    ]
    (first,) = prompt_tuning.main(options)
    assert "--engine torch has no head: the label words' logits" in capsys.readouterr().out
    assert first.parameters == 2 * 16
    assert (tmp_path / "flops" / "model.safetensors").is_file()
    recipe, args = prompt_tuning.parse(options)
    task = load_texts("movies", validation=8, test=12)
    again, _ = prompt_tuning.run(
        "flops", recipe, args, task, known=replace(first, before=-1.0, start=-2.0)
    )
    assert (again.before, again.start, again.after) == (-1.0, -2.0, first.after)
    with pytest.raises(SystemExit, match=r"--engine torch only answers.*no --compare backprop"):
        prompt_tuning.main([*options, "--compare", "backprop"])
    with pytest.raises(SystemExit, match=r"--engine torch only answers.*no --label_head"):
        prompt_tuning.main([*options, "--label_head", "True"])


def test_a_resumed_run_without_a_curve_has_no_picture(tiny, tmp_path, monkeypatch):
    checkpoint, given = tmp_path / "checkpoint-1", []
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    monkeypatch.setattr(
        FlopsTrainer, "train", lambda trainer, start: given.append((start, trainer.args))
    )
    options = (
        "--queries_per_sample auto --validation_texts 0 --test_texts 4 --use_cpu True "
        "--disable_tqdm True"
    )
    options = [
        *options.split(),
        "--label_words",
        "terrible",
        "great",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    prompt_tuning.main([*options, "--resume_from_checkpoint", str(checkpoint)])
    ((start, args),) = given
    assert (start, args.queries_per_sample) == (str(checkpoint), "auto")
    assert "report.png" not in (tmp_path / "out" / "report.md").read_text()
    assert not (tmp_path / "out" / "report.png").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            "--resume_from_checkpoint there --compare backprop",
            "there is of one method, and flops, backprop would start",
        ),
        (
            "--resume_from_checkpoint there",
            "there is no checkpoint: name a folder such as .*flops/checkpoint-100",
        ),
        ("--virtual_tokens 0", "--virtual_tokens 0 must be 1 or more"),
        ("--lora_rank 0", "--lora_rank 0 must be 1 or more"),
        ("--test_texts 0", "--test_texts 0 must be 1 or more"),
        ("--text_tokens -3", "--text_tokens -3 must be 1 or more"),
        ("--per_class -1", "--per_class -1 must be 0 or more"),
        ("--validation_texts -1", "--validation_texts -1 must be 0 or more"),
        ("--learning_rate -1", "--learning_rate -1.0 must be 0 or more"),
        ("--learning_rate nan", "--learning_rate nan must be 0 or more"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size 0 must be 1 or more"),
        ("--warmup_steps -1", "One of the options cannot be used: .*warmup_steps"),
        ("--domain /no/such", "'/no/such' is none of movies, .* and failed to load"),
        ("--model /nowhere", "--model /nowhere cannot be used: .*'/nowhere'"),
        ("--output_dir {file}", "--output_dir .* cannot be used: .*[Nn]ot a directory"),
    ],
)
def test_options_that_cannot_work_end_in_a_sentence_and_leave_no_folder(
    options, match, tmp_path, monkeypatch
):
    monkeypatch.setattr(prompts, "sentences", reviews)
    if "--model" not in options:
        monkeypatch.setattr(prompts, "load_model", language_model)
    (tmp_path / "file").touch()
    given = [
        "--output_dir",
        str(tmp_path / "out"),
        "--use_cpu",
        "True",
        "--label_words",
        "terrible",
        "great",
    ]
    with pytest.raises(ConfigurationError, match=match) as refused:
        prompt_tuning.main([*given, *options.format(file=tmp_path / "file").split()])
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("adapter: sufix", "argument --adapter: invalid choice: 'sufix'"),
        ("objective: acuracy", "argument --objective: invalid choice: 'acuracy'"),
        ("dtype: float99", "argument --dtype: invalid choice: 'float99'"),
        ("per_class: ten", "argument --per_class/--per-class: invalid int value: 'ten'"),
        ("lerning_rate: 3", "lerning_rate is no option: did you mean learning_rate"),
        ("virtual_tokens: 0", "--virtual_tokens 0 must be 1 or more"),
        ("seed: null", "seed has no value: leave it out for its default"),
        ("seed: []", "seed has no value"),
        ("domain: [unclosed", "is damaged: .*expected ',' or ']'"),
        ("", "it has no options by name"),
        (None, "No such file"),
    ],
)
def test_a_yaml_file_is_checked_as_options_are(text, match, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text) if text is not None else None
    with pytest.raises(ConfigurationError, match=match) as refused:
        prompt_tuning.parse([str(path)])
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "option", ["adapter: sufix", "per_class: ten", "compare: [mezo]", "virtual_tokens: 0"]
)
def test_a_wrong_value_is_the_same_error_in_a_file_and_on_the_command_line(
    option, tmp_path, capsys
):
    def refusal(arguments):
        with pytest.raises((SystemExit, ConfigurationError)) as refused:
            prompt_tuning.parse(arguments)
        return capsys.readouterr().err or str(refused.value)

    path = tmp_path / "run.yaml"
    path.write_text(option)
    name, value = option.split(": ")
    said = refusal([f"--{name}", value.strip("[]")]).strip().rpartition("error: ")[2]
    assert said.rstrip(".") in refusal([str(path)])


def test_options_override_a_file_which_comes_first(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        "seed: 1\nlabel_words: [good, bad]\ncompare: [backprop]\nper_class: 4\ninit_text:\n"
    )
    recipe, args = prompt_tuning.parse([str(path), "--seed", "3", "--label_words", "yes", "no"])
    assert (args.seed, recipe.label_words, recipe.compare, recipe.per_class) == (
        3,
        ["yes", "no"],
        ["backprop"],
        4,
    )
    assert recipe.init_text is None
    assert prompt_tuning.parse([str(path), "--init_text", "so"])[0].init_text == "so"
    path.write_text("label_words: [good, bad]\ncompare: []")
    assert prompt_tuning.parse([str(path)])[0].compare == []
    refusals = {
        (
            "--seed",
            "3",
            str(path),
        ): "run.yaml is not understood: options begin with --, and a YAML file comes first",
        ("--lerning_rate", "3"): "--lerning_rate is no option: did you mean --learning_rate?",
        (
            str(path),
            "--lerning_rate",
            "3",
        ): "--lerning_rate is no option: did you mean --learning_rate?",
    }
    for given, sentence in refusals.items():
        with pytest.raises(SystemExit):
            prompt_tuning.parse([*given])
        assert f"error: {sentence}" in capsys.readouterr().err.replace(f"{tmp_path}/", "")
    path.write_text("seed: [1, 2]")
    with pytest.raises(
        ConfigurationError, match=r"run\.yaml cannot be used: 2 is one value too many"
    ):
        prompt_tuning.parse([str(path)])


def test_values_of_a_file_have_the_types_of_options(tmp_path):
    path = tmp_path / "run.yaml"
    lines = ("compare: backprop", "weight_decay: 1e-2", "queries_per_sample: auto", "use_cpu: true")
    path.write_text("\n".join([*lines, "lr_scheduler_kwargs: {a: 1}"]))
    recipe, args = prompt_tuning.parse([str(path)])
    assert (recipe.compare, args.weight_decay, args.queries_per_sample) == (
        ["backprop"],
        0.01,
        "auto",
    )
    assert (args.use_cpu, args.lr_scheduler_kwargs) == (True, {"a": 1})


def test_words_of_a_file_stay_words_and_numbers_are_numbers(tmp_path):
    path = tmp_path / "run.yaml"
    lines = ("label_words: [no, yes]", "init_text: on", "max_steps: 1e1", "weight_decay: .5")
    path.write_text("\n".join([*lines, "learning_rate: 1e-3", "save_strategy: no"]))
    recipe, args = prompt_tuning.parse([str(path)])
    assert (recipe.label_words, recipe.init_text) == (["no", "yes"], "on")
    assert (args.max_steps, args.weight_decay, args.learning_rate) == (10, 0.5, 1e-3)
    assert args.save_strategy == "no"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        (
            "train.csv",
            "sentence,label\na,0\nb,1\n",
            "has the columns sentence, label: it needs text and label",
        ),
        ("train.csv", "", "failed to load as a folder .*: No columns"),
        ("train.csv", "text,label\n", "failed to load as a folder .*no data"),
        (
            "test.csv",
            "text,label\na,0\nb,1\n",
            "failed to load as a folder .*Unknown split .train.",
        ),
        ("train.csv", b"text,label\ncaf\xe9,0\n", "failed to load as a folder .*utf-8"),
        (
            "train.jsonl",
            '{"text": "a", "label": 0}\n{"text": ',
            "failed to load as a folder .*JSON",
        ),
        (
            "train.csv",
            "text,label\na,neg\nb,pos\n",
            "has the label 'neg' in row 0: labels must be whole numbers from 0",
        ),
        ("train.csv", "text,label\na,0.0\nb,1.0\n", "has the label 0.0 in row 0"),
        ("train.csv", "text,label\na,1\nb,-1\n", "has the label -1 in row 1"),
        (
            "train.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b", "label": null}\n',
            "has the label None in row 1",
        ),
        ("train.csv", "text,label\na,1\n,0\n", "has the text None in row 1"),
        ("train.jsonl", '{"text": " ", "label": 1}\n', "has the text ' ' in row 0"),
        (
            "train.csv",
            "text,label\na,0\nb,1\n",
            "has 2 texts of 2 classes: it needs 4 or more of 2 or more",
        ),
        ("train.csv", "text,label\n" + "a,0\n" * 9, "has 9 texts of 1 classes"),
    ],
)
def test_texts_that_cannot_be_used_are_refused_in_a_sentence(
    name, content, match, tmp_path, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with pytest.raises(ConfigurationError, match=match) as refused:
        load_texts(str(tmp_path / "data"), validation=8, test=8)
    assert str(refused.value).startswith(f"'{tmp_path / 'data'}' ")
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)


def test_unknown_kinds_fall_into_no_other():
    with pytest.raises(
        ConfigurationError, match="The adapter 'sufix' is unknown: choose among suffix, prompt"
    ):
        adapted("sufix", None, None, [], virtual_tokens=1, init_text=None, lora_rank=1)
    with pytest.raises(
        ConfigurationError, match="The method 'mezo' is unknown: choose among flops, backprop"
    ):
        prompt_tuning.trainer_for("mezo", None, None, None)


def test_the_yaml_beside_the_recipe_is_read():
    recipe, args = prompt_tuning.parse(["recipes/prompt_tuning.yaml"])
    assert (recipe.domain, recipe.adapter, recipe.label_words) == (
        "movies",
        "suffix",
        [" terrible", " great"],
    )
    assert args.output_dir == "outputs/prompt_tuning"


@pytest.mark.parametrize("adapter", ["suffix", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_server_of_vllm_is_asked(adapter, tiny, tmp_path, monkeypatch):
    pytest.importorskip("httpx")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    options = (
        f"--adapter {adapter} --virtual_tokens 2 --max_steps 1 --queries_per_sample 2 "
        "--eval_strategy no --per_device_train_batch_size 4 --validation_texts 8 --test_texts 12 "
        f"--use_cpu True --disable_tqdm True --output_dir {tmp_path}"
    ).split()
    options += ["--label_words", "terrible", "great"]
    with FakeVllm(language_model()[0], name="small", key="secret") as server:
        given = ["--engine", "vllm", "--engine_url", server.url]
        (outcome,) = prompt_tuning.main([*options, *given])
    rank, layers, width = 2, 1, 16
    sizes = {"suffix": 2 * width, "lora": 2 * layers * rank * 2 * width}
    assert outcome.parameters == sizes[adapter]
    kept = {"suffix": "model.safetensors", "lora": "adapter_model.safetensors"}
    assert (tmp_path / "flops" / kept[adapter]).is_file()
    assert server.adapters == {}
    with pytest.raises(SystemExit, match="--engine_url is of a server: it needs --engine vllm"):
        prompt_tuning.main([*options, "--engine", "torch", "--engine_url", server.url])


@pytest.mark.parametrize("adapter", ["suffix", "lora"])
def test_sums_are_rewarded_by_what_a_server_generates(adapter, tiny, tmp_path, monkeypatch):
    pytest.importorskip("httpx")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    options = (
        f"--domain sums --adapter {adapter} --max_steps 1 --queries_per_sample 2 --eval_steps 1 "
        "--perturbation shared --per_device_train_batch_size 4 --validation_texts 4 --test_texts 4 "
        f"--use_cpu True --disable_tqdm True --output_dir {tmp_path} --engine"
    ).split()
    with FakeVllm(language_model()[0], name="small", key="secret") as server:
        (outcome,) = prompt_tuning.main([*options, "vllm", "--engine_url", server.url])
    assert (outcome.before, outcome.texts) == (outcome.start, 4)
    assert [accuracy for _, accuracy in outcome.curve] == [0.0]  # it knows no numbers
    assert "asked with `Q: What is {text}" in (tmp_path / "report.md").read_text()
    for wrong in ("onnx", "torch --adapter prompt"):
        with pytest.raises(SystemExit, match="--domain sums needs --engine vllm or torch"):
            prompt_tuning.main([*options, *wrong.split()])


def test_answers_are_right_where_they_start_with_the_sum():
    answers = [" 11.", "7", " 9 + 1 =", "", "It is 5", " 123"]
    assert sums.numbers(answers).tolist() == [11, 7, 9, 0, 0, 0]
    labels = torch.tensor([11, 8, 10, 2, 5, 12])
    assert sums.reward(answers, {"labels": labels}).tolist() == [1, 0, 0, 0, 0, 0]
    assert sums.texts()[0] == ("1 + 1", 2)
    assert len(sums.texts()) == 100
