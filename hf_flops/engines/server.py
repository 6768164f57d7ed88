"""A reference server for engines, for experiments and not for the internet."""

from __future__ import annotations

import argparse
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from safetensors.torch import load, save

from ..errors import ConfigurationError, in_one_line
from .local import TorchEngine
from .model import Engine


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], engine: Engine) -> None:
        super().__init__(address, _Handler)
        self.engine, self.engine_lock = engine, threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    """Answers a POST of safetensors with safetensors."""

    server: _Server

    def do_POST(self) -> None:
        """Run the engine on the rows of the request."""
        try:
            tensors = load(self.rfile.read(int(self.headers["Content-Length"])))
            rows = tensors["inputs_embeds"], tensors["attention_mask"]
        except Exception as error:
            return self._answer(400, f"{type(error).__name__}: {error}".encode())
        try:
            with self.server.engine_lock:
                logits = self.server.engine(*rows)
        except Exception as error:
            return self._answer(500, f"{type(error).__name__}: {error}".encode())
        return self._answer(200, save({"logits": logits.contiguous()}))

    def _answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


class EngineServer:
    """Serves an engine over HTTP in a thread, inside a context.

    Args:
        engine: the served engine; it runs one request at a time.
        host: the address to listen at.
        port: the port; 0 for any free one.

    Raises:
        ConfigurationError: the address does not exist on this machine, or is in use.

    Example:
        >>> import torch
        >>> from hf_flops.engines import EngineServer, HttpEngine
        >>> def engine(inputs_embeds, attention_mask):
        ...     return (inputs_embeds * attention_mask[:, :, None]).sum(1) @ table.T
        >>> table = torch.rand(10, 4)  # input embeddings of 10 tokens
        >>> rows, mask = torch.rand(2, 3, 4), torch.ones(2, 3, dtype=torch.int64)
        >>> with EngineServer(engine) as server:
        ...     client = HttpEngine(server.url, batch_rows=1)
        ...     logits = client(rows, mask)
        >>> logits.shape
        torch.Size([2, 10])
    """

    def __init__(self, engine: Engine, host: str = "127.0.0.1", port: int = 0) -> None:
        try:
            self._server = _Server((host, port), engine)
        except (OSError, OverflowError, UnicodeError) as error:
            raise ConfigurationError(
                f"host={host!r} with port={port} cannot be listened at: {error}."
            ) from error
        self._host = host
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )

    @property
    def url(self) -> str:
        """The URL for clients."""
        return f"http://{self._host}:{self._server.server_port}/"

    def __enter__(self) -> EngineServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def main(arguments: list[str] | None = None) -> None:
    """Serve a causal language model of the Hub or a folder."""
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args(arguments)
    try:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    except Exception as error:  # transformers has no common base class
        parser.exit(1, f"{options.model} cannot be loaded: {in_one_line(error)}.\n")
    try:
        ready = EngineServer(TorchEngine(model), options.host, options.port)
    except ConfigurationError as error:
        parser.exit(1, f"{error}\n")
    with ready as server:
        print(f"Serving {options.model} at {server.url}")
        threading.Event().wait()


if __name__ == "__main__":
    main()
