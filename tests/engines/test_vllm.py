"""Prompts and adapters of a model behind vLLM's API, on a server that decodes requests as vLLM
does; scripts/test-vllm runs what is here on vLLM itself too (test_vllm_server.py).
"""

import email.utils
import json
import socket
import ssl
import subprocess
import threading
import time

import pytest
import torch
from peft import LoraConfig, PeftModel

from hf_flops import BlackBoxLoraModel, ConfigurationError, EngineError, FlopsTrainer
from hf_flops.engines import TorchEngine, VllmEngine
from hf_flops.engines.http import seconds_to_wait
from hf_flops.perturbations import NoiseKeys, ParameterVector, RowwiseNoise
from hf_flops.testing import EngineContract
from tests.helpers.black_boxes import SMOOTH, WORDS, arguments, batch, prompted, trainer, tuned
from tests.helpers.tiny import SIZES, VOCABULARY, as_dataset, generator, tiny_model
from tests.helpers.vllm import FakeVllm

pytest.importorskip("httpx")
KEY = "sk-very-secret"


@pytest.fixture(scope="module")
def language_model():
    return tiny_model("llama")


def client(server, **options):
    options = {"batch_rows": 5, "back_off": 0.001, "timeout": 120.0, **options}
    return VllmEngine(server.url, "tiny", **options)


def rows(count=3):
    embeds = torch.randn(count, 4, SIZES["hidden_size"], generator=generator())
    mask = torch.ones(count, 4, dtype=torch.long)
    mask[-1, 2:] = 0
    return embeds, mask


class TestVllmEngine(EngineContract):
    @pytest.fixture(autouse=True)
    def _server(self, language_model):
        with FakeVllm(language_model) as self.server:
            yield

    def make(self):
        return client(self.server), SIZES["hidden_size"], VOCABULARY


def test_scores_and_tokens_are_those_of_the_model(language_model):
    plain = TorchEngine(language_model)
    with FakeVllm(language_model, key=KEY) as server:
        asked = client(server, api_key=KEY, batch_rows=2)
        torch.testing.assert_close(asked(*rows(5), [7, 3, 5]), plain(*rows(5), [7, 3, 5]))
        assert asked.account.calls == 3
        assert asked.generate(*rows(5), max_tokens=4) == plain.generate(
            *rows(5), max_tokens=4, pad_token_id=0, eos_token_id=None
        )
        assert (asked.account.calls, asked.account.rows) == (6, 10)
        assert asked.account.tokens == 2 * (4 * 4 + 2) + 5 * 4
        with pytest.raises(ConfigurationError, match="128 tokens at most, not 129"):
            asked(*rows(), list(range(129)))


def test_http_gives_the_trajectory_of_the_process(language_model, tmp_path):
    engine = TorchEngine(language_model)
    expected = tuned(engine, language_model, tmp_path)

    def rarely(call):
        if call % 20 == 3:  # 5 % of the calls fail
            raise ZeroDivisionError("out of luck")

    with FakeVllm(language_model, trouble=rarely) as server:
        asked = client(server)
        found = tuned(asked, language_model, tmp_path)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (expected - prompted(engine, language_model).prompt.weight).abs().max() > 1e-2
    account = asked.account
    assert account.retries == account.calls // 20 + (account.calls % 20 >= 3)
    assert account.rows >= 4 * 4 * 8
    assert account.tokens >= 5 * account.rows
    assert account.bytes_sent > 4 * 16 * account.tokens
    assert account.bytes_received > 20 * account.rows
    assert account.seconds > 0


def test_a_killed_server_loses_nothing(language_model, tmp_path):
    expected = tuned(TorchEngine(language_model), language_model, tmp_path / "plain")
    options = {"save_strategy": "steps", "save_steps": 2, **SMOOTH}
    with FakeVllm(language_model) as server:
        run = trainer(client(server, retries=1), language_model, tmp_path, **options)
        step = run.training_step

        def killed(*args, **kwargs):
            if run.state.global_step == 3:
                server.shutdown()
                server.server_close()
            return step(*args, **kwargs)

        run.training_step = killed
        match = f"{server.url} failed 2 times in a row.*resume from it"
        with pytest.raises(EngineError, match=match):
            run.train()
        port = server.server_port
    with FakeVllm(language_model, port=port) as server:
        again = trainer(client(server), language_model, tmp_path, **options)
        again.train(resume_from_checkpoint=True)
    assert run.state.global_step == 3
    torch.testing.assert_close(again.model.prompt.weight.detach(), expected, rtol=0, atol=1e-4)


def test_a_server_that_rounds_the_noise_away_is_refused(language_model, tmp_path):
    with FakeVllm(tiny_model("llama").bfloat16(), dtype=torch.bfloat16) as server:
        run = trainer(client(server), language_model, tmp_path, perturbation_scale=1e-3)
        run.model.precision = 3e-2
        with pytest.raises(ConfigurationError, match=r"=0.001 is lost.*--dtype float32"):
            run.train()
    assert run.state.global_step == 0


# --- LoRA ---


def lora(engine, language_model, **options):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BlackBoxLoraModel(engine, language_model.config, config, WORDS, **options)


@torch.no_grad()
def test_an_adapter_is_asked_and_saved_as_peft_has_it(language_model, tmp_path):
    with FakeVllm(tiny_model("llama")) as server:
        model = lora(client(server), language_model)
        base = model(**batch(4)).logits
        for table in model.adapter.values():
            table.weight += torch.randn(table.weight.shape, generator=generator())
        found = model(**batch(4)).logits
        assert server.adapters == {}
        assert server.most == 1  # rows with one adapter share it
    model.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").glob("*.json")) == [
        "adapter_config.json"
    ]
    peft = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "saved").eval()
    for model_, logits in ((language_model, base), (peft, found)):
        for row in range(4):
            text = batch(4)["input_ids"][row][batch(4)["attention_mask"][row].bool()]
            expected = model_(input_ids=text[None]).logits[0, -1, WORDS]
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-5)
    other = lora(None, language_model)
    other.load_adapter(tmp_path / "saved")
    for part, table in other.adapter.items():
        assert table.weight.equal(model.adapter[part].weight)


def test_lora_learns_through_the_pool(language_model, tmp_path):
    with FakeVllm(tiny_model("llama")) as server:
        model = lora(client(server), language_model, pool=16, folder=tmp_path)
        args = arguments(tmp_path / "run", max_steps=8, queries_per_sample=4, learning_rate=0.1)
        run = FlopsTrainer(model, args, train_dataset=as_dataset(batch()))
        run.train()
        assert server.adapters == {}
        assert server.most == 16
    assert not run.session.chosen.perturbation.shares_noise
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-2:]) < sum(losses[:2]) - 0.2


@torch.no_grad()
def test_a_small_pool_is_filled_again_and_again(language_model, tmp_path):
    found, inputs = [], batch()
    for pool in (3, 8):
        with FakeVllm(tiny_model("llama")) as server:
            model = lora(client(server), language_model, pool=pool)
            perturbation = RowwiseNoise(model, ParameterVector.of(model), "gaussian")
            keys = NoiseKeys.of(0, 0, torch.arange(8) // 2, torch.zeros(8, dtype=torch.long), 0)
            with perturbation.applied(perturbation.draw(keys), 0.5):
                found.append(model(**inputs).logits)
            assert (server.most, server.adapters) == (min(pool, 4), {})
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


@torch.no_grad()
def test_text_is_generated_with_an_adapter(language_model, tmp_path):
    with FakeVllm(tiny_model("llama")) as server:
        model = lora(client(server), language_model)
        for table in model.adapter.values():
            table.weight += torch.randn(table.weight.shape, generator=generator())
        inputs = {name: batch(3)[name] for name in ("input_ids", "attention_mask")}
        found = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=1)
        assert server.adapters == {}
    model.save_pretrained(tmp_path)
    peft = TorchEngine(PeftModel.from_pretrained(tiny_model("llama"), tmp_path).merge_and_unload())
    table = language_model.get_input_embeddings().weight
    for row in range(3):
        text = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        rows_ = table[text][None], torch.ones(1, len(text), dtype=torch.long)
        assert [found[row]] == peft.generate(*rows_, 4, pad_token_id=0, eos_token_id=None)


def test_adapters_are_removed_after_a_failure(language_model, tmp_path):
    def crash(call):
        raise ZeroDivisionError("out of luck")

    with FakeVllm(tiny_model("llama"), trouble=crash) as server:
        with pytest.raises(EngineError, match="out of luck"):
            lora(client(server, retries=0), language_model, folder=tmp_path)(**batch())
        assert server.most == 1
        assert server.adapters == {}
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_may_be_loaded_when_its_load_is_repeated(language_model):
    with FakeVllm(tiny_model("llama")) as server:
        load = server.load_adapter

        def lost(request):
            load(request)
            server.load_adapter = load
            raise ZeroDivisionError("the answer is lost")

        model = lora(client(server), language_model)
        wanted, server.load_adapter = model(**batch()).logits, lost
        assert model(**batch()).logits.equal(wanted)
        assert model.engine.account.retries == 1
        assert server.adapters == {}


@torch.no_grad()
def test_nothing_that_is_not_finite_is_sent(language_model):
    """vLLM keeps the keys and values of NaN in memory that other rows use later."""
    with FakeVllm(tiny_model("llama")) as server:
        engine, (embeds, mask) = client(server), rows()
        embeds[1, 0, 0] = torch.nan
        scores, tokens = engine(embeds, mask, WORDS), engine.generate(embeds, mask, 2)
        assert scores.isfinite().all(1).tolist() == [True, False, True]
        assert scores[[0, 2]].equal(engine(embeds[[0, 2]], mask[[0, 2]], WORDS))
        assert [len(row) for row in tokens] == [2, 0, 2]
        assert engine.account.rows == 6
        calls = server.calls
        model = lora(engine, language_model)
        model.adapter["lora_A"].weight[0, 5] = torch.nan
        assert model(**batch()).logits.isnan().all()
        assert (server.calls, server.most) == (calls, 0)


# --- failures ---


class Raw:
    """A server that answers every connection with the same bytes, slowly if it pauses between them,
    or never.
    """

    def __init__(self, answer, pause=0.0, close=True, context=None):
        self.answer, self.calls, self.socket = answer, 0, socket.create_server(("127.0.0.1", 0))
        self.pause, self.close, self.heard, self.context = pause, close, b"", context
        scheme = "http" if context is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self.socket.getsockname()[1]}"
        self.open, self.thread = [], threading.Thread(target=self.serve, daemon=True)

    def serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.calls += 1
            self.open.append(connection)
            try:
                if self.context is not None:
                    connection = self.context.wrap_socket(connection, server_side=True)
                self.answer_to(connection)
            except OSError:  # nobody listens any more
                continue

    def answer_to(self, connection):
        self.heard += connection.recv(100_000)
        if self.answer is not None and self.pause:
            for byte in self.answer:
                connection.sendall(bytes([byte]))
                time.sleep(self.pause)
        elif self.answer is not None:
            connection.sendall(self.answer)
        if self.answer is not None and self.close:
            connection.close()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        for connection in self.open:
            connection.close()
        self.thread.join()


def http(code, body=b"", headers=""):
    head = f"HTTP/1.1 {code} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n"
    return head.encode() + body


def answer(*scores, tokens=WORDS):
    """Return the answer to a call with a row for each dict of scores."""
    choices = [
        {"index": i, "logprobs": {"top_logprobs": [{f"token_id:{t}": row for t in tokens}]}}
        for i, row in enumerate(scores)
    ]
    return http(200, json.dumps({"choices": choices}).encode())


@pytest.mark.parametrize(
    ("given", "calls", "match"),
    [
        (http(429), 3, r"failed 3 times in a row, the last time with: HTTP 429"),
        (http(500, b"sorry"), 3, r"failed 3 times .* HTTP 500: sorry"),
        (http(404, b"nobody"), 1, r"refused: HTTP 404: nobody"),
        (http(307, headers="Location: http://127.0.0.1:1/\r\n"), 1, r"refused: HTTP 307"),
        (http(200, b"hello"), 1, r"5 bytes that are not the scores of the tokens \[5, 7\]"),
        (http(200, b"{}"), 1, r"are not the scores"),
        (http(200, b'{"choices": [{"index": 0, "logprobs": null}]}'), 1, r"are not the scores"),
        (answer(1.0, 2.0, 3.0, tokens=[5, 8]), 1, r"are not the scores"),
        (answer(1.0, None, 3.0), 1, r"are not the scores"),
        (answer(1.0, 2.0), 1, r"with 2 rows for 3 rows"),
        (answer(1.0, 2.0, 3.0, 4.0), 1, r"with 4 rows for 3 rows"),
        (answer(*[1.0] * 30), 1, r"more than max_answer_bytes=1000"),
        (b"what?", 3, r"failed 3 times .*(Read|RemoteProtocol)Error"),
        (b"", 3, r"failed 3 times .*(Read|RemoteProtocol)Error"),
        (answer(1.0, 2.0, 3.0)[:-20], 3, r"failed 3 times .*(Read|RemoteProtocol)Error"),
        (None, 3, r"failed 3 times .*TimeoutError: no answer in 0.2 seconds"),
    ],
)
def test_an_endpoint_that_fails_is_named_and_not_asked_for_ever(given, calls, match):
    timeout = 0.2 if given is None else 5.0
    with Raw(given) as server:
        asked = client(server, retries=2, timeout=timeout, max_answer_bytes=1000)
        with pytest.raises(EngineError, match=f"{server.url}.*{match}"):
            asked(*rows(), WORDS)
        assert (server.calls, asked.account.calls) == (calls, calls)


def test_an_answer_of_three_rows_is_read():
    with Raw(answer(1.0, 2.0, 3.0)) as server:
        assert client(server)(*rows(), WORDS).tolist() == [[1, 1], [2, 2], [3, 3]]


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(EngineError, match=f"{url} failed 2 times .*ConnectError"):
        VllmEngine(url, "tiny", retries=1, back_off=0.001)(*rows(), WORDS)


def test_a_certificate_that_nobody_trusts_is_not_tried_again(tmp_path):
    paths = {name: str(tmp_path / name) for name in ("key", "certificate")}
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=127.0.0.1"
    subprocess.run(
        [*command.split(), "-keyout", paths["key"], "-out", paths["certificate"]],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(paths["certificate"], paths["key"])
    with Raw(answer(1.0), context=context) as server:
        with pytest.raises(EngineError, match=rf"{server.url} is not trusted: .*CERTIFICATE"):
            client(server, retries=5, api_key=KEY)(*rows(), WORDS)
        assert server.calls == 1
        assert server.heard == b""  # nothing was said to it


def test_retry_after_is_waited_for():
    with Raw(http(429, headers="Retry-After: 1\r\n")) as server:
        start = time.perf_counter()
        with pytest.raises(EngineError):
            client(server, retries=1)(*rows(), WORDS)
        assert time.perf_counter() - start >= 1


def test_retry_after_is_a_number_or_a_date():
    assert seconds_to_wait("1.5") == 1.5
    assert 25 < seconds_to_wait(email.utils.formatdate(time.time() + 30, usegmt=True)) < 31
    found = [seconds_to_wait(value) for value in ("", "soon", "Wed, 99 Oct 2099 07:28:00 GMT")]
    assert found == [0, 0, 0]


def test_pauses_grow_and_differ_from_call_to_call(monkeypatch):
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    monkeypatch.setattr("hf_flops.engines.http.asyncio.sleep", sleep)
    with Raw(http(500)) as server:
        for _ in range(2):
            with pytest.raises(EngineError):
                client(server, retries=3, back_off=1.0)(*rows(), WORDS)
    for pause, middle in zip(pauses, [1, 2, 4, 1, 2, 4], strict=True):
        assert middle / 2 <= pause <= 1.5 * middle
    assert len(set(pauses)) == 6


@pytest.mark.parametrize("body", [b"", b"sorry"])
@pytest.mark.parametrize("code", [500, 404])
def test_an_error_whose_body_never_comes_is_still_the_endpoint_s(code, body):
    given = http(code, b" " * 500).rstrip(b" ") + body
    with Raw(given) as server, pytest.raises(EngineError, match=f"{server.url}.*HTTP {code}"):
        client(server, retries=1)(*rows(), WORDS)
    assert server.calls == (2 if code == 500 else 1)


@pytest.mark.parametrize("code", [200, 500])
def test_an_answer_that_trickles_in_is_not_waited_for(code):
    start = time.perf_counter()
    with (
        Raw(http(code, b"x" * 200), pause=0.05) as server,
        pytest.raises(EngineError, match=f"{server.url} failed 1 times .*TimeoutError"),
    ):
        client(server, retries=0, timeout=0.3)(*rows(), WORDS)
    assert time.perf_counter() - start < 3  # head and body take 10 seconds and more


@pytest.mark.parametrize("error", [EngineError("refused"), KeyboardInterrupt()])
def test_a_failed_call_ends_the_others(error, language_model):
    with FakeVllm(language_model) as server:
        asked = client(server, batch_rows=1, concurrency=2)
        ask, calls = asked._once, []

        async def once(*call):
            calls.append(call)
            if len(calls) == 1:
                await asked_sleep(4.0)
            raise error

        from asyncio import sleep as asked_sleep

        asked._once = once
        start = time.perf_counter()
        with pytest.raises(type(error)):
            asked(*rows(8), WORDS)
        assert time.perf_counter() - start < 2
        assert asked.account.calls == 2
        asked._once = ask
        assert asked(*rows(8), WORDS).shape == (8, 2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        *(
            ({"base_url": url}, "base_url=")
            for url in (
                *("not a url", "", "localhost:8000", "http://", "http://host:abc/"),
                *("http://host:99999/", "http://[::1", "http://:80/", b"http://host/", None),
                *("file:///etc/passwd", "ftp://host/", "http://host/a b", "http://host/\n"),
                *("http://host/ü", "http://host/?key=1", "http://host/#a"),
            )
        ),
        *(
            ({name: value}, f"{name}={value!r} must be")
            for name, values in {
                "retries": [-1, 2.5, True],
                "batch_rows": [0, -1, 2.5],
                "concurrency": [0, 1.0],
                "max_calls": [-3, 2.5],
                "max_answer_bytes": [0, 1.5],
                "timeout": [0, -1, None, float("nan"), float("inf")],
                "back_off": [-1, "1", float("nan")],
            }.items()
            for value in values
        ),
    ],
)
def test_clients_that_cannot_work_are_refused(options, match):
    with pytest.raises(ConfigurationError) as caught:
        VllmEngine(**{"base_url": "http://localhost/", "model": "tiny", **options})
    assert str(caught.value).startswith(match)


def test_a_key_is_sent_and_never_shown(language_model, tmp_path):
    with FakeVllm(language_model, key="another") as server:  # repeats what it was sent
        asked = client(server, api_key=KEY)
        with pytest.raises(EngineError, match=r"refused: HTTP 401.*Bearer \*\*\*") as caught:
            asked(*rows(), WORDS)
    texts = [f"{caught.value!r} {asked!r} {asked}"]
    with FakeVllm(language_model, key=KEY) as server:
        options = {"save_strategy": "steps", "save_steps": 2}
        run = trainer(client(server, api_key=KEY), language_model, tmp_path, **options)
        run.train()
        run.create_model_card()
        texts.append(repr(run.model))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} > {"README.md", "model.safetensors"}
    assert all(KEY.encode() not in path.read_bytes() for path in files)
    for wrong in ({"api_key": f"{KEY}\n"}, {"base_url": f"http://me:{KEY}@host/"}):
        with pytest.raises(ConfigurationError, match="api_key") as caught:
            VllmEngine(**{"base_url": "http://localhost/", "model": "tiny", **wrong})
        texts.append(str(caught.value))
    assert all(KEY not in text for text in texts)


def test_calls_have_a_cap(language_model):
    def crash(call):
        raise ZeroDivisionError("out of luck")

    with FakeVllm(language_model, trouble=crash) as server:
        asked = client(server, max_calls=4, retries=100)
        with pytest.raises(EngineError, match=r"max_calls=4 are used up"):
            asked(*rows(), WORDS)
        assert asked.account.calls == 4


def test_batches_go_out_together_and_come_back_in_order(language_model):
    gate = threading.Barrier(3, timeout=5)

    with FakeVllm(language_model) as server:
        server.lock = gate_lock(gate)  # passes only if three calls are under way at a time
        asked = client(server, batch_rows=2, concurrency=3)
        embeds = torch.randn(6, 3, SIZES["hidden_size"], generator=generator())
        found = asked(embeds, torch.ones(6, 3, dtype=torch.long), WORDS)
    expected = TorchEngine(language_model)(embeds, torch.ones(6, 3, dtype=torch.long), WORDS)
    torch.testing.assert_close(found, expected)


def gate_lock(gate):
    class Lock:
        def __enter__(self):
            gate.wait()

        def __exit__(self, *exception):
            return None

    return Lock()


def test_a_server_s_reasons_are_told(language_model):
    with FakeVllm(language_model) as server:
        with pytest.raises(EngineError, match=r"refused: HTTP 404: .*`other` does not exist"):
            VllmEngine(server.url, "other")(*rows(), WORDS)
        with pytest.raises(EngineError, match=r"refused: HTTP 400: .*do not match"):
            client(server)(torch.zeros(2, 3, 5), torch.ones(2, 3), WORDS)
