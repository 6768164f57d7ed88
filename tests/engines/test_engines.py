"""Prompts of models that are only asked for outputs: in this process, in ONNX Runtime, behind
HTTP.
"""

import email.utils
import itertools
import re
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save

from hf_flops import (
    ConfigurationError,
    EngineError,
    FlopsTrainer,
    FlopsTrainingArguments,
    NonFiniteError,
)
from hf_flops.engines import (
    BlackBoxPromptModel,
    EngineServer,
    HttpEngine,
    OnnxEngine,
    TorchEngine,
    export_onnx,
)
from hf_flops.engines import local as engines
from hf_flops.engines.http import RetryableError, seconds_to_wait
from hf_flops.engines.server import main
from recipes.engines import engine_of
from tests.helpers.tiny import SIZES, VOCABULARY, as_dataset, generator, tiny_model

WORDS = [5, 7]
# How runs on different engines are compared, which round in their own ways: of the last bit of a
# number, Adam can make a whole step and an allocator another whole number of queries.
SMOOTH = {"optim": "sgd", "allocator": "uniform", "learning_rate": 0.5}


@pytest.fixture(scope="module")
def language_model():
    return tiny_model("llama")


def batch(samples=8):
    rng = generator()
    lengths = torch.randint(2, 6, (samples, 1), generator=rng)
    ids = torch.randint(3, VOCABULARY, (samples, 5), generator=rng)
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(5) < lengths).long(),
        "labels": torch.arange(samples) % 2,
    }


def prompted(engine, language_model, **options):
    table = language_model.get_input_embeddings().weight
    return BlackBoxPromptModel(
        engine, table, WORDS, num_virtual_tokens=3, init_tokens=[9, 8], **options
    )


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
        "pictures": False,
    }
    args = FlopsTrainingArguments(output_dir=str(folder), **{**defaults, **options})
    return FlopsTrainer(prompted(engine, language_model), args, train_dataset=as_dataset(batch()))


def tuned(engine, language_model, folder, **options):
    run = trainer(engine, language_model, folder, **{**SMOOTH, **options})
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
        inputs = {
            name: value.gather(1, order) if value.dim() == 2 else value
            for name, value in inputs.items()
        }
    outputs = model(**inputs)
    for row in range(8):
        text = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        tokens = torch.cat(
            [text, torch.tensor([9, 8, 9])] if after else [torch.tensor([9, 8, 9]), text]
        )
        expected = language_model(input_ids=tokens[None]).logits[0, -1, WORDS]
        torch.testing.assert_close(outputs.logits[row], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"])
    )
    torch.testing.assert_close(model(**inputs, num_items_in_batch=16).loss, outputs.loss / 2)
    assert set(model.state_dict()) == {"prompt.weight", "label_words"}


@pytest.mark.parametrize(
    ("words", "tokens", "match"),
    [
        ([5, 5], 3, "two or more different tokens"),
        ([5], 3, "two or more"),
        (WORDS, 0, "num_virtual_tokens=0"),
        (WORDS, True, "num_virtual_tokens=True"),
        (
            [5, 999],
            3,
            rf"label_words=\[5, 999\] must be tokens, whole numbers from 0 to {VOCABULARY - 1}",
        ),
        ([5, -1], 3, r"label_words=\[5, -1\]"),
        ([5.0, 7.0], 3, r"label_words=\[5.0, 7.0\]"),
        (5, 3, r"label_words=5 "),
    ],
)
def test_prompts_that_cannot_work_are_refused(words, tokens, match, language_model):
    with pytest.raises(ConfigurationError, match=match):
        BlackBoxPromptModel(crash, language_model.get_input_embeddings().weight, words, tokens)


@pytest.mark.parametrize("tokens", [[999], [-1], [1.5]])
def test_a_prompt_starts_as_tokens_that_there_are(tokens, language_model):
    with pytest.raises(ConfigurationError, match=f"init_tokens=\\[{tokens[0]}"):
        BlackBoxPromptModel(crash, language_model.get_input_embeddings().weight, WORDS, 3, tokens)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([0, 2], "labels hold 2, but label_words are of classes 0 to 1"),
        ([-1, 0], "labels hold -1"),
        ([0.0, 1.0], r"labels of torch.float32 in the shape \(2,\)"),
        ([True, False], "labels of torch.bool"),
        ([0, 1, 1], r"in the shape \(3,\) are not the classes of 2 rows"),
        ([[0, 1], [1, 0]], r"in the shape \(2, 2\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused_before_anything_is_asked(
    labels, match, language_model
):
    inputs = {**batch(2), "labels": torch.tensor(labels)}
    with pytest.raises(ConfigurationError, match=match):
        prompted(crash, language_model)(**inputs)


@torch.no_grad()
def test_labels_may_be_narrow_missing_or_probabilities(language_model):
    model, inputs = prompted(TorchEngine(language_model), language_model), batch(2)
    expected = model(**inputs).loss
    labels = [inputs["labels"].int(), torch.eye(2)[inputs["labels"]]]
    for given in labels:
        torch.testing.assert_close(model(**{**inputs, "labels": given}).loss, expected)
    assert model(**{**inputs, "labels": torch.tensor([0, -100])}).loss.isfinite()


@torch.no_grad()
def test_arrays_are_answers_and_nothing_is_none(language_model):
    plain = TorchEngine(language_model)
    outputs = prompted(lambda *rows: plain(*rows).numpy(), language_model)(**batch())
    torch.testing.assert_close(outputs.logits, prompted(plain, language_model)(**batch()).logits)
    with pytest.raises(EngineError, match=r"<lambda>.* answered with a NoneType, not with logits"):
        prompted(lambda *rows: None, language_model)(**batch())


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
    run = trainer(
        Fails(plain, some, lambda call: run.state.global_step >= 2), language_model, tmp_path
    )
    run.train()
    assert sum(entry.get("dropped_rows", 0) for entry in run.state.log_history) > 0
    assert run.model.prompt.weight.isfinite().all()
    with pytest.raises(NonFiniteError):
        trainer(
            Fails(plain, lambda embeds, mask: plain(embeds, mask) * float("nan")),
            language_model,
            tmp_path,
        ).train()


def test_coarse_engines_keep_noise_per_row_if_they_say_so(language_model, tmp_path):
    calls = iter(range(10_000))

    def coarse(embeds, mask):  # what rounds one way now may round the other way next time
        logits = TorchEngine(language_model)(embeds, mask)
        return logits + 3e-3 * torch.randn(logits.shape, generator=generator(next(calls)))

    table = language_model.get_input_embeddings().weight
    for precision in (1e-4, 3e-2):
        run = trainer(coarse, language_model, tmp_path, max_steps=1)
        run.model.precision = BlackBoxPromptModel(
            coarse, table, WORDS, 3, precision=precision
        ).precision
        run.train()
        assert run.session.chosen.perturbation.shares_noise == (precision == 1e-4)


# --- HTTP ---


def test_http_gives_the_trajectory_of_the_process(language_model, tmp_path):
    engine = TorchEngine(language_model)
    expected = tuned(engine, language_model, tmp_path)
    rarely = Fails(engine, crash, lambda call: call % 20 == 3)  # 5 % of the calls fail
    with EngineServer(rarely) as server:
        asked = client(server)
        found = tuned(asked, language_model, tmp_path)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (expected - prompted(engine, language_model).prompt.weight).abs().max() > 1e-2
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
    options = {"save_strategy": "steps", "save_steps": 2, **SMOOTH}
    with EngineServer(engine) as server:
        asked = client(server, retries=1)
        run = trainer(asked, language_model, tmp_path, **options)
        step = run.training_step

        def killed(*args, **kwargs):
            if run.state.global_step == 3:
                server.__exit__()
            return step(*args, **kwargs)

        run.training_step = killed
        with pytest.raises(
            EngineError, match=f"{server.url} failed 2 times in a row.*resume from it"
        ):
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
    """A server that answers every connection with the same bytes, slowly if it pauses between them,
    or never.
    """

    def __init__(self, answer, pause=0.0, close=True):
        self.answer, self.calls, self.socket = answer, 0, socket.create_server(("127.0.0.1", 0))
        self.pause, self.close, self.heard = pause, close, b""
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
            self.heard += connection.recv(100_000)
            if self.answer is not None:
                self.send(connection)
            if self.answer is not None and self.close:
                connection.close()

    def send(self, connection):
        if not self.pause:
            return connection.sendall(self.answer)
        head, body = self.answer.split(b"\r\n\r\n", 1)
        try:
            for part in (head + b"\r\n\r\n", *(bytes([byte]) for byte in body)):
                connection.sendall(part)
                time.sleep(self.pause)
        except OSError:  # nobody listens any more
            return None

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
        with pytest.raises(
            EngineError, match=f"{server.url} .*{match}" if "refused" not in match else match
        ):
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


def test_retry_after_is_a_number_or_a_date():
    assert seconds_to_wait("1.5") == 1.5
    assert 25 < seconds_to_wait(email.utils.formatdate(time.time() + 30, usegmt=True)) < 31
    assert [seconds_to_wait(value) for value in ("", "soon", "Wed, 99 Oct 2099 07:28:00 GMT")] == [
        0,
        0,
        0,
    ]


@pytest.mark.parametrize("body", [b"", b"sorry"])
@pytest.mark.parametrize("code", [500, 404])
def test_an_error_whose_body_never_comes_is_still_the_endpoint_s(code, body):
    answer = http(code, b" " * 500).rstrip(b" ") + body
    with Raw(answer) as server, pytest.raises(EngineError, match=f"{server.url} .*HTTP {code}"):
        client(server, retries=1)(*rows())
    assert server.calls == (2 if code == 500 else 1)
    with (
        Raw(answer, close=False) as server,
        pytest.raises(EngineError, match=f"{server.url} .*HTTP {code}"),
    ):
        client(server, retries=1, timeout=0.2)(*rows())
    assert server.calls == (2 if code == 500 else 1)


@pytest.mark.parametrize("code", [200, 500])
def test_an_answer_that_trickles_in_is_not_waited_for(code):
    answer = http(code, save({"logits": torch.zeros(3, 2)}))
    start = time.perf_counter()
    with (
        Raw(answer, pause=0.05) as server,
        pytest.raises(EngineError, match=f"{server.url} failed 1 times"),
    ):
        client(server, retries=0, timeout=0.3)(*rows())
    assert time.perf_counter() - start < 3  # the body alone takes 5 seconds


@pytest.mark.parametrize("error", [EngineError("refused"), KeyboardInterrupt()])
def test_a_failed_call_ends_the_others(error):
    asked, numbers = HttpEngine("http://localhost/", batch_rows=1, concurrency=2), itertools.count()

    def post(body):
        if next(numbers) == 0:
            raise RetryableError("busy", 4.0)
        raise error

    asked.post = post
    start = time.perf_counter()
    with pytest.raises(type(error)):
        asked(*rows(8))
    assert time.perf_counter() - start < 2
    time.sleep(0.2)
    assert asked.account.calls == 2


def test_calls_that_do_not_agree_on_the_vocabulary_are_named():
    with EngineServer(lambda embeds, mask: torch.zeros(len(embeds), len(embeds))) as server:
        asked, match = (
            client(server),
            rf"{server.url} .*different numbers of logits per row: \[2, 5\]",
        )
        with pytest.raises(EngineError, match=match):
            asked(*rows(7))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        *(
            ({"url": url}, f"url={url!r} must be http:// or https://")
            for url in (
                *(
                    "not a url",
                    "",
                    "localhost:8000",
                    "http://",
                    "http://host:abc/",
                    "http://host:99999/",
                    "http://[::1",
                ),
                *("http://no..where/", "http://:80/", b"http://host/"),
                *(
                    "file:///etc/passwd",
                    "ftp://host/",
                    "http://host/a b",
                    "http://host/\n",
                    "http://host/ü",
                    None,
                ),
            )
        ),
        *(
            ({name: value}, f"{name}={value!r} must be")
            for name, values in {
                "retries": [-1, 2.5, True],
                "batch_rows": [0, -1, 2.5],
                "concurrency": [0, 1.0],
                "max_calls": [-3, 2.5],
                "timeout": [0, -1, None, float("nan"), float("inf")],
                "back_off": [-1, "1", float("nan")],
            }.items()
            for value in values
        ),
        ({"headers": "key"}, "headers is a str"),
        ({"headers": {"a b": "c"}}, "headers has 'a b'"),
    ],
)
def test_clients_that_cannot_work_are_refused(options, match):
    with pytest.raises(ConfigurationError) as caught:
        HttpEngine(**{"url": "http://localhost/", **options})
    assert str(caught.value).startswith(match)


def test_a_key_is_sent_and_never_shown():
    with Raw(http(401)) as server:
        asked = client(server, headers={"Authorization": "Bearer secret"})
        with pytest.raises(EngineError, match="refused") as caught:
            asked(*rows())
    assert b"Authorization: Bearer secret\r\n" in server.heard
    assert "secret" not in f"{caught.value!r} {asked!r}"
    for wrong in ({"headers": {"Authorization": "secret\n"}}, {"url": "http://me:secret@host/"}):
        with pytest.raises(ConfigurationError) as caught:
            HttpEngine(**{"url": "http://localhost/", **wrong})
        assert "headers" in str(caught.value)
        assert "secret" not in str(caught.value)


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
        post = asked.post

        def together(body):
            gate.wait()  # passes only if three calls are under way at a time
            return post(body)

        asked.post = together
        embeds = torch.arange(6.0)[:, None, None].expand(6, 1, 2)
        assert asked(embeds, torch.ones(6, 1, dtype=torch.long)).equal(embeds[:, 0])


def test_a_server_refuses_what_it_does_not_understand():
    with EngineServer(Fails(None, crash)) as server:
        asked = client(server, retries=0)
        with pytest.raises(EngineError, match="refused: HTTP 400"):
            asked.post(b"nonsense")
        with pytest.raises(EngineError, match="HTTP 500: ZeroDivisionError: out of luck"):
            asked(*rows())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["/nowhere"], "/nowhere cannot be loaded: "),
        (["here", "--port", "99999"], "host='127.0.0.1' with port=99999 cannot be listened at"),
        (["here", "--port", "taken"], "host='127.0.0.1' with port=.* cannot be listened at"),
        (
            ["here", "--host", "203.0.113.7"],
            "host='203.0.113.7' with port=8000 cannot be listened at",
        ),
        (["here", "--host", "no..where"], "host='no..where' with port=8000 cannot be listened at"),
    ],
)
def test_a_server_that_cannot_start_says_why(options, match, language_model, monkeypatch, capsys):
    load = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_pretrained",
        lambda name, **others: language_model if name == "here" else load(name, **others),
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = [
            str(taken.getsockname()[1]) if option == "taken" else option for option in options
        ]
        with pytest.raises(SystemExit) as caught:
            main(options)
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(match, line)


# --- ONNX ---


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
        def run(*rows):
            return self.model(*rows) + self.wrong

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
