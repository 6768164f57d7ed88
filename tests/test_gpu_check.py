"""scripts/gpu_check.py runs on the CPU, with tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_check_of_a_gpu_runs_on_the_cpu(tmp_path):
    output = tmp_path / "found.json"
    command = [sys.executable, "scripts/gpu_check.py", "--device", "cpu", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    assert found["checks"]["noise bits"]
    assert found["checks"]["cosine with autograd"] > 0.97
    assert not [name for name, case in found["cases"].items() if "left out" in case]
    assert all(case["against_plain"]["ours"] > 0 for case in found["cases"].values())
    assert "| SmolLM2-135M, float32 |" in done.stdout
    assert "all checks passed" in done.stdout


def test_a_machine_without_a_gpu_is_told(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "scripts/gpu_check.py", "--output", str(tmp_path / "none.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torch sees no GPU here: --device cpu" in done.stderr
