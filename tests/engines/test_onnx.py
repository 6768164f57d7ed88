"""Engines of ONNX Runtime."""

from pathlib import Path

import pytest
import torch

from hf_flops import ConfigurationError, EngineError
from hf_flops.engines import OnnxEngine, TorchEngine, export_onnx
from hf_flops.engines import local as engines
from recipes.engines import engine_of
from tests.helpers.black_boxes import trainer, tuned
from tests.helpers.tiny import SIZES, VOCABULARY, generator, tiny_model


class Exporter:
    """Stands for ONNX Runtime and torch's exporter: what a session computes is wrong by so much."""

    def __init__(self, monkeypatch, wrong=0.0):
        self.wrong, self.exports = wrong, 0
        monkeypatch.setattr(engines, "_onnxruntime", lambda: None)
        monkeypatch.setattr(engines, "OnnxEngine", self.session)
        monkeypatch.setattr("recipes.engines.OnnxEngine", self.session)
        monkeypatch.setattr(torch.onnx, "export", self.export)
        monkeypatch.setattr(
            engines, "_quantise", lambda runtime, plain, path: path.write_bytes(plain.read_bytes())
        )

    def export(self, model, inputs, path, **options):
        self.model, self.exports = model, self.exports + 1
        Path(path).write_text(str(self.exports))
        Path(f"{path}.data").write_text(str(self.exports))

    def session(self, path, threads=0):
        @torch.no_grad()
        def run(embeds, mask, tokens):
            return self.model(embeds, mask)[:, list(tokens)] + self.wrong

        run.path = Path(path)
        return run


@pytest.fixture
def two_models():
    models = tiny_model("llama", num_hidden_layers=1), tiny_model("llama", num_hidden_layers=1)
    for run, model in zip("ab", models, strict=True):
        model.config.name_or_path = f"/models/run-{run}/final"
    models[1].lm_head.weight.data += 1
    return models


@pytest.mark.parametrize("kind", ["onnx", "onnx-int8"])
def test_each_model_has_a_file_of_its_own(kind, two_models, tmp_path, monkeypatch):
    exporter, (one, two) = Exporter(monkeypatch), two_models
    first, second = (engine_of(kind, model, tmp_path).path for model in (one, two))
    assert engine_of(kind, one, tmp_path).path == first != second
    one.lm_head.weight.data += 2  # tuned on, at one path
    third = engine_of(kind, one, tmp_path).path
    files = [first, second, third]
    assert [path.read_text() for path in files] == ["1", "2", "3"]
    weights = [] if kind == "onnx-int8" else [path.with_name(f"{path.name}.data") for path in files]
    assert set(tmp_path.iterdir()) == {*files, *weights}
    assert exporter.exports == 3


@pytest.mark.parametrize("int8", [False, True])
def test_a_file_is_checked_before_it_is_there(int8, two_models, tmp_path, monkeypatch):
    exporter, kind = Exporter(monkeypatch, wrong=99.0), "onnx-int8" if int8 else "onnx"
    for _ in range(2):
        with pytest.raises(
            ConfigurationError, match="cannot be exported: its logits would differ by 99"
        ):
            engine_of(kind, two_models[0], tmp_path)
    assert list(tmp_path.iterdir()) == []
    exporter.wrong = 0.0
    path = export_onnx(two_models[0], tmp_path / "kept.onnx", int8=int8)
    exporter.wrong = 99.0
    with pytest.raises(ConfigurationError):
        export_onnx(two_models[1], path, int8=int8)
    assert path.read_text() == "3"


@pytest.fixture(scope="module")
def onnx_files(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, folder = (
        tiny_model("llama", num_hidden_layers=1, initializer_range=0.1),
        tmp_path_factory.mktemp("onnx"),
    )
    return (
        model,
        export_onnx(model, folder / "fp32.onnx"),
        export_onnx(model, folder / "int8.onnx", int8=True),
    )


@torch.no_grad()
def test_an_onnx_session_computes_what_the_model_does(onnx_files):
    model, plain, int8 = onnx_files
    embeds = torch.randn(3, 7, SIZES["hidden_size"], generator=generator())
    mask = (torch.arange(7) < torch.tensor([[7], [3], [1]])).long()
    every = range(VOCABULARY)
    expected = TorchEngine(model)(embeds, mask, every)
    torch.testing.assert_close(
        OnnxEngine(plain)(embeds, mask, every), expected, rtol=1e-4, atol=1e-5
    )
    coarse = OnnxEngine(int8)(embeds, mask, every)
    assert torch.cosine_similarity(coarse, expected).min() > 0.95
    assert not torch.allclose(coarse, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(EngineError, match=r"fp32.onnx.*failed"):
        OnnxEngine(plain)(embeds[..., 1:], mask, every)


def test_a_prompt_is_trained_through_onnx(onnx_files, tmp_path):
    model, plain, int8 = onnx_files
    expected = tuned(TorchEngine(model), model, tmp_path)
    torch.testing.assert_close(
        tuned(OnnxEngine(plain), model, tmp_path), expected, rtol=0, atol=1e-3
    )
    run = trainer(
        OnnxEngine(int8),
        model,
        tmp_path,
        max_steps=30,
        perturbation_scale=0.1,
        lr_scheduler_type="constant",
    )
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4])
