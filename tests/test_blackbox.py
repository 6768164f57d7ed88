"""Prompts of models that are only asked for outputs: in this process, in ONNX Runtime, behind HTTP."""

import gc
import socket
import threading
import time

import pytest
import torch
from safetensors.torch import save

from hf_flops import ConfigurationError, EngineError, FlopsTrainer, FlopsTrainingArguments, NonFiniteError
from hf_flops.blackbox import BlackBoxPromptModel, EngineServer, HttpEngine, OnnxEngine, TorchEngine, export_onnx
from tests.tiny import SIZES, VOCABULARY, as_dataset, generator, tiny_model

WORDS = [5, 7]


@pytest.fixture(autouse=True, scope="module")
def _collect_young_objects_only():
    gc.freeze()  # every `train()` collects garbage, which takes long with everything that is imported
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def language_model():
    return tiny_model("llama")


def batch(samples=8):
    rng = generator()
    lengths = torch.randint(2, 6, (samples, 1), generator=rng)
    ids = torch.randint(3, VOCABULARY, (samples, 5), generator=rng)
    return {"input_ids": ids, "attention_mask": (torch.arange(5) < lengths).long(), "labels": torch.arange(samples) % 2}


def prompted(engine, language_model, **options):
    table = language_model.get_input_embeddings().weight
    return BlackBoxPromptModel(engine, table, WORDS, num_virtual_tokens=3, init_tokens=[9, 8], **options)


def trainer(engine, language_model, folder, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "queries_per_sample": 8,
        "max_steps": 4,
        "learning_rate": 0.05,
        "perturbation_scale": 1e-2,
        "rows_per_forward": 16,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = FlopsTrainingArguments(output_dir=str(folder), **{**defaults, **options})
    return FlopsTrainer(prompted(engine, language_model), args, train_dataset=as_dataset(batch()))


def tuned(engine, language_model, folder, **options):
    run = trainer(engine, language_model, folder, **options)
    run.train()
    return run.model.prompt.weight.detach().clone()


def client(server, **options):
    return HttpEngine(server.url, **{"batch_rows": 5, "back_off": 0.001, "timeout": 5.0, **options})


class Fails:
    """An engine that does something else on some of its calls."""

    def __init__(self, engine, instead, when=lambda call: True):
        self.engine, self.instead, self.when, self.calls = engine, instead, when, 0

    def __call__(self, *rows):
        self.calls += 1
        return self.instead(*rows) if self.when(self.calls) else self.engine(*rows)


def crash(*rows):
    raise ZeroDivisionError("out of luck")


# --- the model ---


@torch.no_grad()
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_answers_are_those_of_prompt_and_text(side, after, language_model):
    model, inputs = prompted(TorchEngine(language_model), language_model, after=after), batch()
    if side == "left":
        order = inputs["attention_mask"].argsort(dim=1, stable=True)
        inputs = {name: value.gather(1, order) if value.dim() == 2 else value for name, value in inputs.items()}
    outputs = model(**inputs)
    for row in range(8):
        text = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        tokens = torch.cat([text, torch.tensor([9, 8, 9])] if after else [torch.tensor([9, 8, 9]), text])
        expected = language_model(input_ids=tokens[None]).logits[0, -1, WORDS]
        torch.testing.assert_close(outputs.logits[row], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"]))
    torch.testing.assert_close(model(**inputs, num_items_in_batch=16).loss, outputs.loss / 2)
    assert set(model.state_dict()) == {"prompt.weight", "label_words"}


@pytest.mark.parametrize(
    ("words", "tokens", "match"),
    [([5, 5], 3, "two or more different tokens"), ([5], 3, "two or more"), (WORDS, 0, "num_virtual_tokens=0")],
)
def test_prompts_that_cannot_work_are_refused(words, tokens, match, language_model):
    with pytest.raises(ConfigurationError, match=match):
        BlackBoxPromptModel(crash, language_model.get_input_embeddings().weight, words, tokens)


def test_wrong_shapes_are_named(language_model, tmp_path):
    engine = Fails(None, lambda embeds, mask: torch.zeros(len(embeds), 3))
    with pytest.raises(EngineError, match=r"Fails.* answered with the shape \(\d+, 3\)"):
        trainer(engine, language_model, tmp_path).train()


def test_nan_from_some_rows_is_passed_over_and_from_all_is_an_error(language_model, tmp_path):
    def some(embeds, mask):
        logits = TorchEngine(language_model)(embeds, mask)
        logits[0] = float("nan")
        return logits

    plain = TorchEngine(language_model)
    run = trainer(Fails(plain, some, lambda call: run.state.global_step >= 2), language_model, tmp_path)
    run.train()
    assert sum(entry.get("dropped_rows", 0) for entry in run.state.log_history) > 0
    assert run.model.prompt.weight.isfinite().all()
    with pytest.raises(NonFiniteError):
        trainer(Fails(plain, lambda embeds, mask: plain(embeds, mask) * float("nan")), language_model, tmp_path).train()


def test_coarse_engines_keep_noise_per_row_if_they_say_so(language_model, tmp_path):
    calls = iter(range(10_000))

    def coarse(embeds, mask):  # what rounds one way now may round the other way next time
        logits = TorchEngine(language_model)(embeds, mask)
        return logits + 3e-3 * torch.randn(logits.shape, generator=generator(next(calls)))

    table = language_model.get_input_embeddings().weight
    for precision in (1e-4, 3e-2):
        run = trainer(coarse, language_model, tmp_path, max_steps=1)
        run.model.precision = BlackBoxPromptModel(coarse, table, WORDS, 3, precision=precision).precision
        run.train()
        assert run._perturbation.grouped == (precision == 1e-4)


# --- HTTP ---


def test_http_gives_the_trajectory_of_the_process(language_model, tmp_path):
    engine = TorchEngine(language_model)
    expected = tuned(engine, language_model, tmp_path)
    rarely = Fails(engine, crash, lambda call: call % 20 == 3)  # 5 % of the calls fail
    with EngineServer(rarely) as server:
        asked = client(server)
        found = tuned(asked, language_model, tmp_path)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert not expected.equal(prompted(engine, language_model).prompt.weight)
    account = asked.account
    assert account.retries == account.calls // 20 + (account.calls % 20 >= 3)
    assert account.rows >= 4 * 4 * 8
    assert account.tokens >= 5 * account.rows
    assert account.bytes_sent > 4 * 16 * account.tokens
    assert account.bytes_received > 4 * VOCABULARY * account.rows
    assert account.seconds > 0


def test_a_killed_server_loses_nothing(language_model, tmp_path):
    engine = TorchEngine(language_model)
    expected = tuned(engine, language_model, tmp_path / "plain")
    options = {"save_strategy": "steps", "save_steps": 2}
    with EngineServer(engine) as server:
        asked = client(server, retries=1)
        run = trainer(asked, language_model, tmp_path, **options)
        step = run.training_step

        def killed(*args, **kwargs):
            if run.state.global_step == 3:
                server.__exit__()
            return step(*args, **kwargs)

        run.training_step = killed
        with pytest.raises(EngineError, match=f"{server.url} failed 2 times in a row.*resume from it"):
            run.train()
        port = int(server.url.rstrip("/").rpartition(":")[2])
    with EngineServer(engine, port=port) as server:
        again = trainer(client(server), language_model, tmp_path, **options)
        again.train(resume_from_checkpoint=True)
    assert run.state.global_step == 3
    torch.testing.assert_close(again.model.prompt.weight.detach(), expected, rtol=0, atol=1e-4)


def rows(count=3):
    return torch.zeros(count, 2, 16), torch.ones(count, 2, dtype=torch.long)


class Raw:
    """A server that answers every connection with the same bytes, or never."""

    def __init__(self, answer):
        self.answer, self.calls, self.socket = answer, 0, socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        self.open, self.thread = [], threading.Thread(target=self.serve, daemon=True)

    def serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.calls += 1
            self.open.append(connection)
            connection.recv(100_000)
            if self.answer is not None:
                connection.sendall(self.answer)
                connection.close()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join()
        for connection in self.open:
            connection.close()


def http(code, body=b"", headers=""):
    return f"HTTP/1.1 {code} X\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


@pytest.mark.parametrize(
    ("answer", "calls", "match"),
    [
        (http(429), 3, r"failed 3 times in a row, the last time with: HTTP 429"),
        (http(500, b"sorry"), 3, r"failed 3 times .* HTTP 500: sorry"),
        (http(404, b"nobody"), 1, r"refused: HTTP 404: nobody"),
        (http(200, b"hello"), 1, r"5 bytes that are not logits"),
        (http(200, save({"scores": torch.zeros(3, 2)})), 1, r"are not logits"),
        (http(200, save({"logits": torch.zeros(2, 4)})), 1, r"the shape \(2, 4\) for 3 rows"),
        (b"what?", 3, r"failed 3 times"),
        (b"", 3, r"failed 3 times"),
        (None, 3, r"failed 3 times .* (TimeoutError|timed out)"),
    ],
)
def test_an_endpoint_that_fails_is_named_and_not_asked_for_ever(answer, calls, match):
    with Raw(answer) as server:
        with pytest.raises(EngineError, match=f"{server.url} .*{match}" if "refused" not in match else match):
            client(server, retries=2, timeout=0.1 if answer is None else 5.0)(*rows())
        assert server.calls == calls


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    with pytest.raises(EngineError, match=f"{url} failed 2 times .*refused"):
        HttpEngine(url, retries=1, back_off=0.001)(*rows())


def test_retry_after_is_waited_for():
    with Raw(http(429, headers="Retry-After: 1\r\n")) as server:
        start = time.perf_counter()
        with pytest.raises(EngineError):
            client(server, retries=1)(*rows())
        assert time.perf_counter() - start >= 1


def test_calls_have_a_cap(language_model):
    with EngineServer(Fails(None, crash)) as server:
        asked = client(server, max_calls=4, retries=100)
        with pytest.raises(EngineError, match=r"max_calls=4 are used up"):
            asked(*rows())
        assert asked.account.calls == 4


def test_batches_go_out_together_and_come_back_in_order():
    gate = threading.Barrier(3, timeout=5)

    class Slow(Fails):
        def __call__(self, embeds, mask):
            return embeds[:, 0, :2]

    with EngineServer(Slow(None, None)) as server:
        asked = client(server, batch_rows=2, concurrency=3)
        post = asked._post

        def together(body):
            gate.wait()  # passes only if three calls are under way at a time
            return post(body)

        asked._post = together
        embeds = torch.arange(6.0)[:, None, None].expand(6, 1, 2)
        assert asked(embeds, torch.ones(6, 1, dtype=torch.long)).equal(embeds[:, 0])


def test_a_server_refuses_what_it_does_not_understand():
    with EngineServer(Fails(None, crash)) as server:
        asked = client(server, retries=0)
        with pytest.raises(EngineError, match="refused: HTTP 400"):
            asked._post(b"nonsense")
        with pytest.raises(EngineError, match="HTTP 500: ZeroDivisionError: out of luck"):
            asked(*rows())


# --- ONNX ---


@pytest.fixture(scope="module")
def onnx_files(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, folder = tiny_model("llama", num_hidden_layers=1, initializer_range=0.1), tmp_path_factory.mktemp("onnx")
    return model, export_onnx(model, folder / "fp32.onnx"), export_onnx(model, folder / "int8.onnx", int8=True)


@torch.no_grad()
def test_an_onnx_session_computes_what_the_model_does(onnx_files):
    model, plain, int8 = onnx_files
    embeds = torch.randn(3, 7, SIZES["hidden_size"], generator=generator())
    mask = (torch.arange(7) < torch.tensor([[7], [3], [1]])).long()
    expected = TorchEngine(model)(embeds, mask)
    torch.testing.assert_close(OnnxEngine(plain)(embeds, mask), expected, rtol=1e-4, atol=1e-5)
    coarse = OnnxEngine(int8)(embeds, mask)
    assert torch.cosine_similarity(coarse, expected).min() > 0.95
    assert not torch.allclose(coarse, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(EngineError, match=r"fp32.onnx.*failed"):
        OnnxEngine(plain)(embeds[..., 1:], mask)


def test_a_prompt_is_trained_through_onnx(onnx_files, tmp_path):
    model, plain, int8 = onnx_files
    expected = tuned(TorchEngine(model), model, tmp_path)
    torch.testing.assert_close(tuned(OnnxEngine(plain), model, tmp_path), expected, rtol=0, atol=1e-3)
    run = trainer(OnnxEngine(int8), model, tmp_path, max_steps=30, perturbation_scale=0.1, lr_scheduler_type="constant")
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4])
