"""vLLM's own server, in a process of its own, while a recipe or a test needs it."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from hf_flops import ConfigurationError

FLOAT32 = "--dtype float32 --max-logprobs -1 --logprobs-mode raw_logits --enforce-eager"
# Blocks of the prefix cache must be shorter than texts: on CPUs they have 128 tokens by default.
PROMPTS = "--enable-prompt-embeds --block-size 32"
# Fewer modules and smaller ranks cost less, whatever an adapter has of them.
LORA = "--enable-lora --max-loras 8 --max-cpu-loras 64 --lora-target-modules q_proj v_proj qkv_proj"


class VllmServer:
    """Serves a model as "small" inside a context.

    Args:
        model: Hub id or folder.
        log: a file for what it says.
        options: of its command line.
        port: 0 for any free one.
        patience: seconds that it may take to start.

    Attributes:
        url: of the server.
        key: what requests must send: VLLM_API_KEY of the environment, or one that is drawn.
    """

    name = "small"

    def __init__(
        self,
        model: str,
        log: str | Path,
        options: str = f"{FLOAT32} {LORA} --max-lora-rank 8",
        port: int = 0,
        patience: float = 900.0,
    ) -> None:
        with socket.create_server(("127.0.0.1", port)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.key = os.environ.setdefault("VLLM_API_KEY", secrets.token_hex())
        self.model, self.log, self.options, self.patience = model, Path(log), options, patience
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> VllmServer:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", self.model, "--served-model-name", self.name]
        command += [*PROMPTS.split(), *self.options.split()]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", "512"]
        given = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as file:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **given},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        start = time.monotonic()
        while self._process.poll() is None and time.monotonic() - start < self.patience:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return self
            time.sleep(1)
        self.__exit__()
        raise ConfigurationError(
            f"vLLM does not start: see {self.log}. Is it installed (pip install vllm)?"
        )

    def __exit__(self, *exception: object) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its workers too
        self._process.wait()
