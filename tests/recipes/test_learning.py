"""Real training: a ViT that knows five digits learns the other five without a backward pass."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from hf_flops import ConfigurationError, FlopsTrainer, FlopsTrainingArguments
from recipes import alignment, vit
from recipes.images import (
    PatchShuffler,
    collate,
    load_images,
    load_vit,
    patch_order,
    pixel_dataset,
    pretrained_vit,
    reorder_patches,
)
from recipes.runs import accuracy
from recipes.solved_head import FROZEN, features, frozen_adapter, training_loss


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    task = load_images("digits")
    path = pretrained_vit(task, tmp_path_factory.mktemp("cache"), epochs=12)
    _, processor = load_vit(path, task)
    return task, path, pixel_dataset(task.train, processor), pixel_dataset(task.test, processor)


def adapt(digits, tmp_path, seed, **options):
    """Train LoRA and a new head; returns the test accuracy before and after."""
    task, path, train, test = digits
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, _ = load_vit(path, task)
        args = FlopsTrainingArguments(
            output_dir=str(tmp_path),
            **{
                "seed": seed,
                "num_train_epochs": 6,
                "per_device_train_batch_size": 32,
                "per_device_eval_batch_size": 600,
                "learning_rate": 4e-2,
                "queries_per_sample": 16,
                "rows_per_forward": 512,
                "report_to": "none",
                "save_strategy": "no",
                "disable_tqdm": True,
                "pictures": False,
                **options,
            },
        )
        config = LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]
        )
        data = {"train_dataset": train, "eval_dataset": test, "data_collator": collate}
        trainer = FlopsTrainer(model, args, peft_config=config, compute_metrics=accuracy, **data)
        before = trainer.evaluate()["eval_accuracy"]
        trainer.train()
        return before, trainer.evaluate()["eval_accuracy"]


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_the_adapter_learns_new_digits(digits, tmp_path, seed):
    before, after = adapt(digits, tmp_path, seed)
    assert before < 0.3
    assert after > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["mezo", "flops-authors"])
def test_the_other_presets_learn_too(digits, tmp_path, preset):
    before, after = adapt(
        digits, tmp_path, 0, preset=preset, num_train_epochs=8, learning_rate=2e-2
    )
    assert after > before + 0.25


def check_rows(folder):
    """Return how many rows the log says that the checks of the first batch took."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    (rows,) = {entry["check_rows"] for entry in history if "check_rows" in entry}
    assert rows > 0
    return rows


def test_the_recipe_leaves_a_report_a_picture_and_adapters(
    digits, tmp_path, monkeypatch, capsys, drawn
):
    monkeypatch.setattr("recipes.images.pretrained_vit", lambda task: digits[1])
    options = (
        "--dataset digits --per_class 16 --num_train_epochs 1 --queries_per_sample 8 --compare "
        "backprop mezo"
    )
    monkeypatch.setattr(
        "sys.argv",
        ["vit.py", *options.split(), "--disable_tqdm", "True", "--output_dir", str(tmp_path)],
    )
    vit.main()
    assert "of backprop's reduction of the training loss" in capsys.readouterr().out
    report = (tmp_path / "report.md").read_text()
    outcomes = {
        o["method"]: o for o in json.loads((tmp_path / "results.json").read_text())["outcomes"]
    }
    frozen = outcomes.pop(FROZEN)
    assert set(outcomes) == {"flops", "backprop", "mezo"}
    assert frozen["rows"] == 80
    assert outcomes["flops"]["rows"] == 80 * 8 + check_rows(tmp_path / "flops")
    assert outcomes["mezo"]["rows"] == 80 * 8 + check_rows(tmp_path / "mezo")
    assert outcomes["backprop"]["rows"] == 80
    losses, curves, queries, *images = drawn["report.png"].axes
    assert [axes.get_title() for axes in (losses, curves, queries)] == [
        "Loss against rows",
        "Accuracy against rows",
        "Where the queries went",
    ]
    for axes, name, split in (
        (losses, "losses", "training loss"),
        (curves, "curve", "validation accuracy"),
    ):
        assert split in axes.get_ylabel()
        legend = [text.get_text() for text in axes.get_legend().get_texts()]
        assert legend == [*outcomes, FROZEN]
        *lines, dashed = axes.lines
        for line, outcome in zip(lines, outcomes.values(), strict=True):
            assert line.get_xydata().tolist() == outcome[name]
            assert outcome[name][0][0] == 0
            assert outcome[name][-1][0] == outcome["rows"]
        assert dashed.get_linestyle() == "--"
        assert set(dashed.get_ydata()) == {frozen[name][-1][1]}
    # with the adapter as it starts, whatever is trained then
    assert [outcome["losses"][0][1] for outcome in outcomes.values()] == [
        frozen["losses"][0][1]
    ] * 3
    # the eight most queried, and the eight least
    assert [len(axes.images) for axes in images] == [1] * 16
    assert (tmp_path / "report.png").is_file()
    for method, outcome in {FROZEN: frozen, **outcomes}.items():
        loss = outcome["losses"][-1][1]
        shown = f"**{outcome['after']:.1%}** | {loss:.3f} | {outcome['curve'][-1][1]:.1%} |"
        assert f"| {method} | {shown}" in report
    for method in outcomes:
        assert (tmp_path / method / "adapter_model.safetensors").is_file()
        card = (tmp_path / method / "README.md").read_text()
        assert "ore information" not in card.replace("-", " ")
        assert "## Load it" in card
        assert ("## Forward-only training" in card) == (method != "backprop")


def test_patches_move_together_and_come_back(digits):
    task, path, train, _ = digits
    model, processor = load_vit(path, task)
    shuffled = pixel_dataset(task.train, PatchShuffler(processor, model.config)).tensors[0]
    pixels, order = train.tensors[0], patch_order(8, 8, 2)
    assert sorted(order.tolist()) == list(range(16))
    assert torch.equal(reorder_patches(shuffled, 2, order.argsort()), pixels)
    moved = [place for place, patch in enumerate(order.tolist()) if place != patch]
    assert len(moved) > 8
    for place, patch in enumerate(order.tolist()):
        (row, column), (old_row, old_column) = divmod(place, 4), divmod(patch, 4)
        new = shuffled[..., 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        old = pixels[..., 2 * old_row : 2 * old_row + 2, 2 * old_column : 2 * old_column + 2]
        assert torch.equal(new, old)


def test_patches_that_cannot_be_shuffled_are_refused(digits):
    task, path, *_ = digits
    model, processor = load_vit(path, task)
    model.config.patch_size = 3
    processor = PatchShuffler(processor, model.config)
    with pytest.raises(ConfigurationError, match="8 × 8 pixels do not divide by 3"):
        pixel_dataset(task.train, processor)
    with pytest.raises(ConfigurationError, match="a resnet model's patch_size is None"):
        PatchShuffler(processor, ResNetConfig())


def test_a_head_on_frozen_features_is_solved(digits, monkeypatch):
    monkeypatch.setattr("recipes.images.pretrained_vit", lambda task: digits[1])
    recipe = vit.RecipeArguments(dataset="digits")
    path, task, data = vit.load_data(recipe, seed=0)
    model = vit.adapter_model(recipe, path, task, seed=0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frozen = frozen_adapter(model, data)
    assert frozen.after > 0.7
    inputs, labels = (torch.tensor(part) for part in features(model, data["train"]))
    weights = torch.zeros(5, inputs.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=2000, line_search_fn="strong_wolfe")

    def objective():
        logits = inputs @ weights[:, :-1].T + weights[:, -1]
        return torch.nn.functional.cross_entropy(logits, labels)

    def closure():
        optimizer.zero_grad()
        loss = objective() + 0.15 * weights[:, :-1].square().sum() / len(labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert frozen.losses == [(len(labels), pytest.approx(objective().item(), rel=0.01))]
    assert training_loss(model, data["train"]) == frozen.losses[0][1]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_recipe_refuses_an_unknown_method(capsys):
    with pytest.raises(SystemExit):
        vit.parse(["--compare", "adam"])
    assert (
        "--compare adam is unknown: choose among flops, mezo, flops-authors, backprop"
        in capsys.readouterr().err
    )


def test_the_recipe_reads_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("dataset: digits\nmethod: mezo\nqueries_per_sample: 8\nlearning_rate: 0.01\n")
    recipe, args = vit.parse([str(path)])
    assert (recipe.method, args.queries_per_sample, args.learning_rate) == ("mezo", 8, 0.01)


class Stop(Exception):
    """Ends a run where it would train."""


class Stopped:
    """A trainer that trains nothing."""

    def __init__(self, rate):
        self.rate = rate

    def evaluate(self, *data, **options):
        return {"test_accuracy": 0.0}

    def add_callback(self, callback):
        assert callback.points == []

    def train(self, checkpoint):
        raise Stop(self.rate, checkpoint)


@pytest.mark.parametrize(
    ("recipe", "model"), [(vit, "adapter_model"), (alignment, "adapted_model")]
)
def test_a_rate_of_zero_and_a_checkpoint_reach_the_trainer(recipe, model, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, model, lambda *given: None)
    monkeypatch.setattr(
        recipe, "trainer_for", lambda method, model, args, *data: Stopped(args.learning_rate)
    )
    monkeypatch.setattr(alignment, "evaluate", lambda *given: {})
    own, args = recipe.parse(
        ["--learning_rate", "0", "--resume_from_checkpoint", "there", "--output_dir", str(tmp_path)]
    )
    task = SimpleNamespace(name="digits", train=None, collate=None)
    given = ["", task, dict.fromkeys(("train", "validation", "test"))] if recipe is vit else [task]
    with pytest.raises(Stop) as stop:
        recipe.run("flops", own, args, *given)
    assert stop.value.args == (0.0, "there")


def test_auto_is_an_answer_to_how_many(tmp_path):
    _, args = vit.parse(["--queries_per_sample", "auto", "--rows_per_forward", "auto"])
    assert (args.queries_per_sample, args.rows_per_forward) == ("auto", "auto")
    assert vit.parse(["--queries_per_sample", "8"])[1].queries_per_sample == 8
    with pytest.raises(
        ConfigurationError,
        match=r"--queries_per_sample auto does not know .*: give a number to align",
    ):
        alignment.parse(["--queries_per_sample", "auto"])


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Return what makes a folder of pictures in classes, by the names of its files."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def build(*names):
        for name in names:
            (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / name)
        return tmp_path / "data"

    return build


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ([f"test/{c}/{i}.png" for c in "ab" for i in range(8)], "has no split 'train', but test"),
        ([f"train/{c}/0.png" for c in "ab"], "has 2 images to train on: 8 or more"),
        ([f"train/a/{i}.png" for i in range(8)], "no column of images or of class labels"),
        (
            [f"train/{c}/{i}.png" for c in "ab" for i in range(8)],
            "--dataset .* cannot be used: cannot identify image file",
        ),
    ],
)
def test_pictures_that_cannot_be_used_are_refused_in_a_sentence(names, match, pictures, tmp_path):
    folder = pictures(*names)
    (folder / names[0]).write_bytes(b"no picture") if "cannot identify" in match else None
    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    )
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size=8).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigurationError, match=match) as refused:
        vit.load_data(
            vit.RecipeArguments(dataset=str(folder), model=str(tmp_path / "model")), seed=0
        )
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)


def test_a_model_without_attention_layers_is_refused(tmp_path):
    ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    ).save_pretrained(tmp_path)
    ViTImageProcessorPil(size=8).save_pretrained(tmp_path)
    recipe = vit.RecipeArguments(model=str(tmp_path))
    with pytest.raises(
        ConfigurationError,
        match=r"is a ResNetForImageClassification, .* choose a vision transformer",
    ):
        vit.adapter_model(recipe, str(tmp_path), load_images("digits"), seed=0)
