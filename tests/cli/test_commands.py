"""The command hf-flops: it starts without torch, and its subcommands do what they say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

import hf_flops
from hf_flops.cli import compare, plot
from hf_flops.cli.main import COMMANDS, function, main
from hf_flops.cli.recipes import recipe
from hf_flops.reporting import run_plots

ROOT = Path(hf_flops.__file__).parent.parent
HISTORY = [
    {"loss": 1.2, "rows": 640, "seconds": 1.0, "signal_to_noise": 0.02, "step": 10},
    {"eval_accuracy": 0.5, "eval_loss": 1.0, "step": 10},
    {"loss": 0.9, "rows": 1280, "seconds": 2.5, "signal_to_noise": 0.01, "step": 20},
    {"eval_accuracy": 0.75, "eval_loss": 0.8, "step": 20},
]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["replay", "--help"],
        ["plot", "--help"],
        ["compare", "--help"],
        ["doctor", "--help"],
        ["vit", "--help"],
        ["prompt", "--help"],
        ["align", "-h"],
        [],
    ],
)
def test_help_loads_neither_torch_nor_transformers(arguments):
    code = (
        "import sys\n"
        "from hf_flops.cli.main import main\n"
        "try:\n"
        f"    assert main({arguments!r}) == 0\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "print('LOADED', *(name for name in ('torch', 'transformers', 'peft', 'numpy') if name in "
        "sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert out.splitlines()[-1].split() == ["LOADED"]
    if arguments in (["--help"], []):
        assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_a_function_that_prints_its_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        function(command)(["--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: hf-flops {command} ")


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["frobnicate"])
    assert "frobnicate is no command: choose among vit, prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["dcotor"], "dcotor is no command: did you mean doctor?"),
        (["doctor", "--modle", "vit"], "--modle is no option: did you mean --model?"),
        (["doctor", "--batchsize=4"], "--batchsize=4 is no option: did you mean --batch_size?"),
        (["plot", "outputs", "--outptu", "x"], "--outptu is no option: did you mean --output?"),
        (["replay", "x", "--output", "y", "--frobnicate"], "--frobnicate is no option: see --help"),
    ],
)
def test_a_typo_is_named_with_what_is_nearest(arguments, hint, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert f"error: {hint}" in capsys.readouterr().err


def test_plot_finds_the_run_in_the_folder_of_a_recipe(tmp_path):
    for method in ("backprop", "flops", "mezo"):
        (tmp_path / method).mkdir()
        (tmp_path / method / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    with pytest.raises(
        hf_flops.ConfigurationError, match=r"several runs: name one, .*backprop or "
    ):
        plot.newest(tmp_path)
    outcomes = [{"method": "mezo"}, {"method": "backprop"}]
    (tmp_path / "results.json").write_text(json.dumps({"outcomes": outcomes}))
    assert plot.newest(tmp_path) == tmp_path / "mezo"


def test_an_interrupted_command_says_so_in_a_line(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(plot, "main", interrupted)
    assert main(["plot", "outputs"]) == 1
    assert capsys.readouterr().err == "hf-flops plot: interrupted.\n"


def test_a_library_that_is_missing_is_named_with_what_brings_it(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "recipes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(["compare", "--rows", "100"]) == 1
    assert capsys.readouterr().err.strip() == (
        "hf-flops compare: PIL is not installed: pip install 'hf_flops[recipes]' installs all "
        "that the commands need."
    )


def test_pictures_without_matplotlib_end_in_a_sentence(monkeypatch, tmp_path, capsys):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", str(tmp_path)]) == 1
    assert (
        capsys.readouterr().err.strip()
        == "hf-flops plot: Pictures need matplotlib: pip install 'hf_flops[plots]'."
    )


@pytest.mark.parametrize("command", ["vit", "prompt", "align"])
def test_help_of_a_recipe_shows_what_matters_and_no_more(command, capsys):
    def shown(option):
        with pytest.raises(SystemExit) as end:
            main([command, option])
        assert end.value.code == 0
        return capsys.readouterr().out

    short, everything = shown("--help"), shown("--help_all")
    assert short.startswith(f"usage: hf-flops {command} ")
    assert all(
        option in short
        for option in ("--queries_per_sample", "--learning_rate", "--trajectory_log", "--lora_rank")
    )
    assert "--hub_token" not in short
    assert "--hub_token" in everything


def test_the_recipes_are_found_beside_the_package_and_their_files_are_read():
    own = recipe("vit")
    parsed, args = own.parse([str(ROOT / "recipes" / "vit.yaml")])
    assert parsed.compare == ["mezo", "backprop"]
    assert args.queries_per_sample == 8


def test_plot_reads_the_newest_state_of_a_run_and_draws_it(tmp_path, drawn):
    with pytest.raises(hf_flops.ConfigurationError, match=r"holds no trainer_state\.json"):
        plot.read_run(tmp_path)
    # 10 is newer than 9, though not in the order of text
    for step, history in ((9, HISTORY[:2]), (10, HISTORY)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        (folder / "flops_state.json").write_text(
            json.dumps({"ledger": {"samples": [[0, 2, 30], [1, 2, 10]]}})
        )
    assert plot.read_run(tmp_path) == {
        "curve": [(640, 1.0, 0.5), (1280, 2.5, 0.75)],
        "measure": "validation accuracy",
        "signal": [(640, 0.02), (1280, 0.01)],
        "queries": [15.0, 5.0],
    }
    assert main(["plot", str(tmp_path)]) == 0
    rows, seconds, signal, queries = drawn["run.png"].axes
    assert rows.lines[0].get_xydata().tolist() == [[640, 0.5], [1280, 0.75]]
    assert (rows.get_xlabel(), rows.get_ylabel()) == (
        "rows through the model",
        "validation accuracy",
    )
    assert seconds.lines[0].get_xydata().tolist() == [[1, 0.5], [2.5, 0.75]]
    assert signal.lines[0].get_xydata().tolist() == [[640, 0.02], [1280, 0.01]]
    assert (signal.get_title(), queries.get_title()) == (
        "Signal to noise",
        "Where the queries went",
    )
    assert imread(tmp_path / "run.png").std() > 0.01


def test_plot_falls_back_to_the_training_loss_and_wants_rows(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY[::2]}))
    run = plot.read_run(tmp_path)
    assert (run["measure"], [value for *_, value in run["curve"]]) == ("training loss", [1.2, 0.9])
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"loss": 1.0, "step": 1}]})
    )
    with pytest.raises(hf_flops.ConfigurationError, match="no log of rows"):
        plot.read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("trainer_state.json", content) for content in ("", "{", "[]", "{}")),
        *(("flops_state.json", content) for content in ("", "{}", '{"ledger": {}}')),
    ],
)
def test_plot_names_a_damaged_file(name, content, tmp_path, capsys):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    (tmp_path / name).write_text(content)
    assert main(["plot", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"hf-flops plot: {tmp_path / name} is damaged: ")


def test_plot_says_which_file_it_wrote_or_could_not(tmp_path, monkeypatch, capsys):
    for folder in ("checkpoint-abc", "checkpoint-3"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    (tmp_path / "there").mkdir()

    def refused(output):
        assert main(["plot", str(tmp_path), "--output", str(tmp_path / output)]) == 1
        assert capsys.readouterr().err.startswith(
            f"hf-flops plot: The picture {tmp_path / output} cannot be saved: "
        )

    refused("x.foo")
    monkeypatch.setattr(run_plots, "save_run", lambda path, **run: path.touch())
    refused("no/such/x.png")
    for output, written in (("x", "x.png"), ("x.pdf", "x.pdf"), ("there", "there/run.png")):
        assert main(["plot", str(tmp_path), "--output", str(tmp_path / output)]) == 0
        assert capsys.readouterr().out == f"Picture: {tmp_path / written}\n"
        assert (tmp_path / written).is_file()


def test_compare_gives_every_preset_the_same_rows(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(compare, "run", lambda *call: ran.append(call) or 0)
    assert compare.main(["--presets", "mezo", "flops", "--rows", "500", "--dataset", "digits"]) == 0
    options = [
        "--method",
        "mezo",
        "--output_dir",
        "outputs/compare",
        "--compare",
        "flops",
        "--max_queries",
        "500",
    ]
    assert ran == [("vit", "compare", [*options, "--dataset", "digits"])]
    for wrong in (["--presets", "spsa"], ["--presets", "flops", "backprop", "--rows", "500"]):
        with pytest.raises(SystemExit):
            compare.main(wrong)
    assert "spsa" in capsys.readouterr().err
    others = (
        ["--compare", "backprop"],
        ["--comp=backprop"],
        ["--method", "mezo"],
        ["--max-queries", "9"],
        ["run.yaml"],
    )
    for other in others:
        with pytest.raises(SystemExit):
            compare.main(["--presets", "flops", "--rows", "200", *other])
        assert f"error: {other[0]} is" in capsys.readouterr().err
    assert len(ran) == 1


def test_a_recipe_that_cannot_work_ends_in_a_line(tmp_path, capsys, monkeypatch):
    out = ["--output_dir", str(tmp_path / "out"), "--use_cpu", "True"]
    assert main(["vit", "--dataset", str(tmp_path), *out]) == 1
    assert main(["vit", "--dataset", "digits", "--model", "/nowhere", *out]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(
        f"hf-flops vit: '{tmp_path}' failed to load as a folder or a data set of the Hub: "
    )
    assert second.startswith("hf-flops vit: --model /nowhere cannot be used: ")
    with pytest.raises(SystemExit):
        main(["vit", "--method", "foo"])
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "usage: hf-flops vit [FILE.yaml] [OPTIONS]"
    assert "argument --method: invalid choice: 'foo'" in error
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", ["vit.py", "--lora_rank", "0"])
    with pytest.raises(SystemExit, match=r"^vit\.py: --lora_rank 0 must be 1 or more\.$"):
        recipe("common").start(recipe("vit").main)
