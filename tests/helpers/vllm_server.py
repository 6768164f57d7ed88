"""vLLM's own server, in a process of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

OPTIONS = "--dtype float32 --enforce-eager --max-logprobs -1 --logprobs-mode raw_logits"
LORA = "--enable-lora --max-loras 8 --max-cpu-loras 64 --max-lora-rank 8"


class VllmServer:
    """Serves a model as "small" inside a context.

    Args:
        model: Hub id or folder.
        key: what requests must send.
        options: of the command line, in place of the defaults.
        port: 0 for any free one.
        log: a file for what it says.
    """

    def __init__(self, model, log, key="secret", options=f"{OPTIONS} {LORA}", port=0):
        with socket.create_server(("127.0.0.1", port)) as free:
            self.port = free.getsockname()[1]
        self.url, self.model, self.key, self.log = f"http://127.0.0.1:{self.port}", model, key, log
        self.options, self.process = options, None

    def __enter__(self):
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            self.model,
        ]
        command += ["--served-model-name", "small", "--enable-prompt-embeds", *self.options.split()]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--max-model-len", "512"]
        given = {"VLLM_API_KEY": self.key, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        with open(self.log, "ab") as file:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **given},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        start = time.monotonic()
        while time.monotonic() - start < 400:
            assert self.process.poll() is None, f"the server has ended: see {self.log}"
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return self
            time.sleep(1)
        self.__exit__()
        raise TimeoutError(f"no server after 400 seconds: see {self.log}")

    def __exit__(self, *exception):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its workers too
        self.process.wait()
