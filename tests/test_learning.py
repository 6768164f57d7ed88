"""Real training: a ViT that knows five digits learns the other five without a backward pass."""

import json

import pytest
import torch
from peft import LoraConfig

from hf_flops import FlopsTrainer, FlopsTrainingArguments
from recipes import vit
from recipes.images import collate, load_images, load_vit, pixel_dataset, pretrained_vit


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
                **options,
            },
        )
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        data = {"train_dataset": train, "eval_dataset": test, "data_collator": collate}
        trainer = FlopsTrainer(model, args, peft_config=config, compute_metrics=vit.accuracy, **data)
        before = trainer.evaluate()["eval_accuracy"]
        trainer.train()
        return before, trainer.evaluate()["eval_accuracy"]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_the_adapter_learns_new_digits(digits, tmp_path, seed):
    before, after = adapt(digits, tmp_path, seed)
    assert before < 0.3
    assert after > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["mezo", "flops-authors"])
def test_the_other_presets_learn_too(digits, tmp_path, preset):
    before, after = adapt(digits, tmp_path, 0, preset=preset, num_train_epochs=8, learning_rate=2e-2)
    assert after > before + 0.25


def test_the_recipe_leaves_a_report_a_picture_and_adapters(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vit, "pretrained_vit", lambda task: digits[1])
    options = "--dataset digits --per_class 16 --num_train_epochs 1 --queries_per_sample 8 --compare backprop mezo"
    monkeypatch.setattr("sys.argv", ["vit.py", *options.split(), "--disable_tqdm", "True", "--output_dir", str(tmp_path)])
    vit.main()
    assert "of the way from the untrained adapter to backprop" in capsys.readouterr().out
    assert (tmp_path / "report.png").stat().st_size > 10_000
    report = (tmp_path / "report.md").read_text()
    outcomes = {o["method"]: o for o in json.loads((tmp_path / "results.json").read_text())["outcomes"]}
    assert set(outcomes) == {"flops", "backprop", "mezo"}
    assert outcomes["flops"]["rows"] == 80 * 8
    assert outcomes["mezo"]["rows"] == 80 * 8
    assert outcomes["backprop"]["rows"] == 80
    for method, outcome in outcomes.items():
        assert f"| {method} | {outcome['before']:.1%} | **{outcome['after']:.1%}** |" in report
        assert (tmp_path / method / "adapter_model.safetensors").is_file()


def test_the_recipe_refuses_an_unknown_method(capsys):
    with pytest.raises(SystemExit):
        vit.parse(["--compare", "adam"])
    assert "--compare adam is unknown: choose among flops, mezo, flops-authors, backprop" in capsys.readouterr().err


def test_the_recipe_reads_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("dataset: digits\nmethod: mezo\nqueries_per_sample: 8\nlearning_rate: 0.01\n")
    recipe, args = vit.parse([str(path)])
    assert (recipe.method, args.queries_per_sample, args.learning_rate) == ("mezo", 8, 0.01)
