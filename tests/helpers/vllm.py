"""A server that decodes requests as vLLM's does and answers in its words, with a small model."""

import base64
import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file

MOST_TOKENS = 128


class Refused(Exception):
    """A request that vLLM answers with an error."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class FakeVllm(ThreadingHTTPServer):
    """Serves a causal language model of transformers inside a context.

    Args:
        model: the model.
        name: what requests must call it.
        key: what they must send; None for nothing.
        dtype: what embeddings are cast to, and logits rounded to.
        trouble: called with the number of a completion, from 1; it may raise.
    """

    daemon_threads = True

    def __init__(self, model, name="tiny", key=None, dtype=None, trouble=None, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.name, self.key, self.trouble = model, name, key, trouble
        self.dtype = dtype or torch.float32
        self.calls, self.most, self.adapters, self.lock = 0, 0, {}, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()
        self.thread.join()

    def load_adapter(self, request):
        """Do what /v1/load_lora_adapter does."""
        name, folder = request["lora_name"], Path(request["lora_path"])
        if name in self.adapters:
            raise Refused(400, f"The lora adapter '{name}' has already been loaded.")
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        self.adapters[name] = config["lora_alpha"] / config["r"], tensors
        self.most = max(self.most, len(self.adapters))

    def unload_adapter(self, request):
        """Do what /v1/unload_lora_adapter does."""
        if self.adapters.pop(request["lora_name"], None) is None:
            raise Refused(404, f"The lora adapter '{request['lora_name']}' cannot be found.")

    @contextmanager
    def adapted(self, name):
        """Add an adapter to the model's weights inside the context."""
        scale, tensors = self.adapters.get(name, (1.0, {}))
        weights = {}
        for key, a in tensors.items():
            if ".lora_A." in key:
                layer = key.removeprefix("base_model.model.").partition(".lora_A.")[0]
                weights[layer] = scale * tensors[key.replace("lora_A", "lora_B")] @ a
        layers = [self.model.get_submodule(layer) for layer in weights]
        before = [layer.weight.data for layer in layers]
        for layer, weight in zip(layers, weights.values(), strict=True):
            layer.weight.data = layer.weight.data + weight
        try:
            yield
        finally:
            for layer, weight in zip(layers, before, strict=True):
                layer.weight.data = weight

    def complete(self, request):
        """Do what /v1/completions does."""
        self.calls += 1
        if self.trouble is not None:
            self.trouble(self.calls)
        name = request["model"]
        if name not in (self.name, *self.adapters):
            raise Refused(404, f"The model `{name}` does not exist.")
        tokens = request.get("logprob_token_ids")
        if tokens and request.get("logprobs") is None:
            raise Refused(400, "when using `logprob_token_ids`, `logprobs` must be set.")
        if tokens and (len(tokens) > MOST_TOKENS or max(tokens) >= self.model.config.vocab_size):
            raise Refused(400, f"Requested logprob_token_ids of length {len(tokens)}")
        rows = [self.decode(part) for part in request.get("prompt_embeds") or request["prompt"]]
        with self.adapted(name):
            return [self.answer(i, row, request) for i, row in enumerate(rows)]

    def decode(self, part):
        """Return the embeddings (1, T, D) of a prompt."""
        table = self.model.get_input_embeddings().weight
        if isinstance(part, list):
            return table[torch.tensor(part)][None].to(self.dtype)
        try:
            file = io.BytesIO(base64.b64decode(part, validate=True))
            tensor = torch.load(file, weights_only=True)
        except Exception as error:
            raise Refused(400, "`prompt_embeds` could not be deserialized") from error
        if tensor.dim() != 2 or tensor.shape[1] != table.shape[1]:
            raise Refused(400, f"`prompt_embeds` of shape {tuple(tensor.shape)} do not match.")
        if not tensor.is_floating_point():
            raise Refused(400, f"`prompt_embeds` dtype {tensor.dtype} is not floating-point.")
        return tensor[None].to(self.dtype)

    @torch.no_grad()
    def answer(self, index, row, request):
        """Return the choice of one prompt, greedy."""
        tokens, scores = [], []
        for _ in range(request["max_tokens"]):
            weight = self.model.get_input_embeddings().weight
            logits = self.model(inputs_embeds=row.to(weight)).logits[0, -1].to(self.dtype).float()
            tokens.append(int(logits.argmax()))
            wanted = {tokens[-1], *(request.get("logprob_token_ids") or ())}
            form = "token_id:{}" if request.get("return_tokens_as_token_ids") else "word{}"
            scores.append({form.format(token): float(logits[token]) for token in wanted})
            row = torch.cat([row, weight[tokens[-1]][None, None].to(row)], 1)
        return {
            "index": index,
            "text": "",
            "logprobs": None if request.get("logprobs") is None else {"top_logprobs": scores},
            "finish_reason": "length",
            "token_ids": tokens if request.get("return_token_ids") else None,
        }


class Handler(BaseHTTPRequestHandler):
    """Reads JSON and writes JSON."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        try:
            if server.key and self.headers["Authorization"] != f"Bearer {server.key}":
                raise Refused(401, f"Unauthorized: {self.headers['Authorization']}")
            request = json.loads(body)
            with server.lock:
                if self.path == "/v1/completions":
                    choices = server.complete(request)
                    return self.send(200, json.dumps({"choices": choices[::-1]}).encode())
                ways = {
                    "/v1/load_lora_adapter": server.load_adapter,
                    "/v1/unload_lora_adapter": server.unload_adapter,
                }
                if self.path not in ways:
                    raise Refused(404, "Not Found")
                ways[self.path](request)
                return self.send(200, b"Success")
        except Refused as error:
            self.send(error.code, json.dumps({"error": {"message": str(error)}}).encode())
        except Exception as error:
            self.send(500, json.dumps({"error": {"message": repr(error)}}).encode())

    def send(self, code, body):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Log nothing."""
