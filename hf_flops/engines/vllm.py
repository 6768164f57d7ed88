"""vLLM as an engine: its server, over the OpenAI-compatible API, or its `LLM` in this process."""

from __future__ import annotations

import base64
import io
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError, EngineError
from .base import Prompt, finite, without_padding
from .http import Account, Endpoint, at_least

_MOST = 128  # tokens that vLLM scores at a time
Options = dict[str, Any]


class _Vllm:
    """What server and process have in common; adapters are what `loaded` gives, one a prompt.

    vLLM is never asked about embeddings that are not finite: they would stay in the memory of its
    keys and values, and make other rows NaN that use it later.
    """

    account: Account
    _asked: Callable[[Sequence[Prompt], Options, Sequence[Any] | None], list[list[Any]]]

    def __call__(
        self, inputs_embeds: Tensor, attention_mask: Tensor, token_ids: Sequence[int]
    ) -> Tensor:
        """See `Engine`."""
        return self.scores(without_padding(inputs_embeds, attention_mask), token_ids)

    def scores(
        self, prompts: Sequence[Prompt], token_ids: Sequence[int], adapters: object = None
    ) -> Tensor:
        """Return scores (R, C) of tokens after R prompts."""
        if len(token_ids) > _MOST:
            raise ConfigurationError(f"vLLM scores {_MOST} tokens at most, not {len(token_ids)}.")
        options = {"max_tokens": 1, "temperature": 0.0, "logprob_token_ids": list(token_ids)}
        unknown = [math.nan] * len(token_ids)
        return torch.tensor(self._counted(prompts, options, adapters, unknown))

    def generate(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        max_tokens: int = 16,
        temperature: float = 0.0,
        **options: object,
    ) -> list[list[int]]:
        """Return the tokens that continue each row; options, such as `top_p`, are vLLM's."""
        options |= {"max_tokens": max_tokens, "temperature": temperature}
        return self.continued(without_padding(inputs_embeds, attention_mask), options)

    def continued(
        self, prompts: Sequence[Prompt], options: Options, adapters: object = None
    ) -> list[list[int]]:
        """Return the tokens that continue prompts, sampled by vLLM's options."""
        tokens = self._counted(prompts, options, adapters, [])
        self.account.tokens += sum(map(len, tokens))
        return tokens

    def _counted(
        self, prompts: Sequence[Prompt], options: Options, adapters: Any, unknown: list[Any]
    ) -> list[Any]:
        """Ask about the finite prompts, and count them; the answer to others is `unknown`."""
        rows = [i for i, row in enumerate(prompts) if not isinstance(row, Tensor) or finite(row)]
        asked = [prompts[i] for i in rows]
        names = adapters and [adapters[i] for i in rows]
        found = self._asked(asked, options, names) if asked else []
        self.account.rows += len(asked)
        self.account.tokens += sum(map(len, asked))
        answers = dict(zip(rows, found, strict=True))
        return [answers.get(i, unknown) for i in range(len(prompts))]


class VllmEngine(Endpoint, _Vllm):
    """A vLLM server, asked by `POST /v1/completions`.

    Start it with `--enable-prompt-embeds --dtype float32 --max-logprobs -1`, for adapters also with
    `--enable-lora` and `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`.

    Args:
        base_url: such as "http://localhost:8000", without /v1.
        model: the name that the server knows the model by.
        batch_rows: rows per call.
        options: `api_key`, sent with every call and shown in no message or file; `concurrency`
            (4), calls at a time; `timeout` (60), seconds after which a call without a complete
            answer has failed; `retries` (5) after 429, a server error, a broken connection or a
            timeout, never of a certificate that is not trusted; `back_off` (0.5), seconds before
            the first retry, doubled for each further one, half more or less by chance, where
            Retry-After does not ask for more, a minute at most; `max_calls` (none), the limit of
            calls, retries included; `max_answer_bytes` (64 MiB).

    Attributes:
        account: calls and costs so far.

    Raises:
        ConfigurationError: an invalid argument.
        ImportError: the extra `http` is not installed.
        EngineError: when called: the server refused, redirected, failed repeatedly or gave an
            invalid answer, or `max_calls` is reached.
    """

    def __init__(self, base_url: str, model: str, batch_rows: int = 32, **options: Any) -> None:
        super().__init__(base_url, **options)
        self.model, self.batch_rows = model, at_least("batch_rows", batch_rows, 1)

    def __repr__(self) -> str:
        return f"VllmEngine({self.url!r}, {self.model!r})"

    @contextmanager
    def loaded(self, folders: Sequence[Path]) -> Iterator[list[str]]:
        """Have PEFT's folders, which the server must see too, loaded as adapters; gives names."""
        names = [f"hf-flops-{uuid.uuid4().hex}" for _ in folders]
        # not `load_inplace`, with which vLLM reads the files again at each of its steps
        loads = [
            {"lora_name": name, "lora_path": str(folder)}
            for name, folder in zip(names, folders, strict=True)
        ]
        bodies = [json.dumps(load).encode() for load in loads]
        try:
            self.post("/v1/load_lora_adapter", bodies, done="has already been loaded")
            yield names
        finally:
            bodies = [json.dumps({"lora_name": name}).encode() for name in names]
            with suppress(EngineError):  # the server drops adapters that nobody asks for, too
                self.post("/v1/unload_lora_adapter", bodies, retries=1)

    def _asked(
        self, prompts: Sequence[Prompt], options: Options, adapters: Sequence[str] | None
    ) -> list[list[Any]]:
        """Return for each prompt the scores of `logprob_token_ids`, else the generated tokens."""
        tokens = options.get("logprob_token_ids")
        form = {"logprobs": 1, "return_tokens_as_token_ids": True} if tokens else {}
        options = {"return_token_ids": True, **form, **options}
        models, parts = adapters or [self.model] * len(prompts), list[tuple[str, list[Prompt]]]()
        for model, pairs in groupby(zip(models, prompts, strict=True), key=itemgetter(0)):
            rows = [prompt for _, prompt in pairs]
            starts = range(0, len(rows), self.batch_rows)
            parts += [(model, rows[start : start + self.batch_rows]) for start in starts]
        bodies = [
            json.dumps({"model": model, **options, **as_json(rows)}).encode()
            for model, rows in parts
        ]
        answers = zip(self.post("/v1/completions", bodies), parts, strict=True)
        return [row for each, (_, rows) in answers for row in self._rows(each, len(rows), tokens)]

    def _rows(self, answer: bytes, size: int, tokens: list[int] | None) -> list[list[Any]]:
        """Return what an answer says about each of its rows."""
        what = "tokens" if tokens is None else f"scores of the tokens {tokens}"
        try:
            choices = sorted(json.loads(answer)["choices"], key=itemgetter("index"))
            if tokens is None:
                rows: list[list[Any]] = [[*map(int, choice["token_ids"])] for choice in choices]
            else:
                found = [choice["logprobs"]["top_logprobs"][0] for choice in choices]
                rows = [[float(row[f"token_id:{token}"]) for token in tokens] for row in found]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise EngineError(
                f"{self!r} answered with {len(answer)} bytes that are not the {what}: it must "
                "speak as vLLM 0.32 and later do."
            ) from error
        if [choice["index"] for choice in choices] != list(range(size)):
            raise EngineError(f"{self!r} answered with {len(choices)} rows for {size} rows.")
        return rows


class VllmInProcess(_Vllm):
    """A `vllm.LLM` in this process.

    Args:
        llm: `vllm.LLM(model, dtype="float32", enable_prompt_embeds=True, max_logprobs=-1)`, for
            adapters also with `enable_lora=True`.

    Attributes:
        account: calls, rows, tokens and seconds so far.
    """

    def __init__(self, llm: Any) -> None:
        self.llm, self.account = llm, Account()

    def __repr__(self) -> str:
        return f"VllmInProcess({type(self.llm).__name__})"

    @contextmanager
    def loaded(self, folders: Sequence[Path]) -> Iterator[list[Any]]:
        """Have PEFT's folders loaded as adapters inside the context; gives their requests."""
        from vllm.lora.request import LoRARequest

        numbers = [uuid.uuid4().int % 2**31 + 1 for _ in folders]
        pairs = zip(numbers, folders, strict=True)
        try:
            yield [LoRARequest(f"hf-flops-{number}", number, str(path)) for number, path in pairs]
        finally:
            for number in numbers:
                self.llm.llm_engine.remove_lora(number)

    def _asked(
        self, prompts: Sequence[Prompt], options: Options, adapters: Sequence[Any] | None
    ) -> list[list[Any]]:
        from vllm import SamplingParams

        names = ["prompt_embeds" if torch.is_tensor(row) else "prompt_token_ids" for row in prompts]
        rows = [{name: prompt} for name, prompt in zip(names, prompts, strict=True)]
        params = SamplingParams(**options)
        start = time.perf_counter()
        answers = self.llm.generate(rows, params, use_tqdm=False, lora_request=adapters)
        self.account.seconds += time.perf_counter() - start
        self.account.calls += 1
        found = [answer.outputs[0] for answer in answers]
        if (tokens := options.get("logprob_token_ids")) is None:
            return [list(row.token_ids) for row in found]
        return [[row.logprobs[0][token].logprob for token in tokens] for row in found]


def as_json(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Return prompts, all embeddings or all tokens, in the form that the server takes."""
    files = [io.BytesIO() for _ in prompts]
    for prompt, file in zip(prompts, files, strict=True):
        if not isinstance(prompt, Tensor):
            return {"prompt": list(prompts)}
        torch.save(prompt.clone(), file)  # a view would bring all of its storage
    return {"prompt_embeds": [base64.b64encode(file.getvalue()).decode() for file in files]}
