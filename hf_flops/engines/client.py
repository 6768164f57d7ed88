"""An engine behind HTTP: concurrent calls, time limits, bounded retries, a count of costs."""

from __future__ import annotations

import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..errors import ConfigurationError, EngineError
from .http import RetryableError, check_headers, check_url, read_body, seconds_to_wait

_LONGEST_WAIT = 60.0  # seconds between two attempts


@dataclass
class Account:
    """Calls and costs of an endpoint.

    Attributes:
        calls: requests, retries included.
        retries: repeated requests.
        rows: answered rows.
        tokens: their tokens, padding included.
        bytes_sent: size of request bodies.
        bytes_received: size of answer bodies.
        seconds: latency, summed over calls.
    """

    calls: int = 0
    retries: int = 0
    rows: int = 0
    tokens: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0


class HttpEngine:
    """A client of `EngineServer`, or of any server with the same protocol.

    A call posts `inputs_embeds` and `attention_mask` of a few rows as safetensors, and receives
    `logits` as safetensors.

    Args:
        url: of the endpoint.
        batch_rows: rows per call.
        concurrency: calls at a time.
        timeout: seconds after which a call without a complete answer has failed.
        retries: number of retries after 429, a server error, a broken connection or a timeout.
        back_off: seconds before the first retry, doubled for each further one; a longer Retry-After
            of the server is obeyed. The longest wait is a minute.
        max_calls: limit of calls of this object, retries included; None for no limit.
        headers: sent with every call, such as {"Authorization": "Bearer ..."}; they do not appear
            in errors and are not sent to redirection targets.

    Attributes:
        account: calls and costs so far.

    Raises:
        ConfigurationError: an invalid argument.
        EngineError: when called: the endpoint refused, failed repeatedly or gave an invalid answer,
            or `max_calls` is reached.

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
        >>> torch.allclose(logits, engine(rows, mask)), client.account.calls
        (True, 2)
    """

    def __init__(
        self,
        url: str,
        *,
        batch_rows: int = 32,
        concurrency: int = 4,
        timeout: float = 60.0,
        retries: int = 5,
        back_off: float = 0.5,
        max_calls: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        check_url(url)
        check_headers({} if headers is None else headers)
        for name, value, least in (
            ("batch_rows", batch_rows, 1),
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
            ("max_calls", 0 if max_calls is None else max_calls, 0),
        ):
            if type(value) is not int or value < least:
                raise ConfigurationError(
                    f"{name}={value!r} must be a whole number, {least} or more."
                )
        if not isinstance(timeout, int | float) or not 0 < timeout <= threading.TIMEOUT_MAX:
            raise ConfigurationError(
                f"timeout={timeout!r} must be a number of seconds, more than 0."
            )
        if not isinstance(back_off, int | float) or not 0 <= back_off <= threading.TIMEOUT_MAX:
            raise ConfigurationError(
                f"back_off={back_off!r} must be a number of seconds, 0 or more."
            )
        self.url, self.batch_rows = url, batch_rows
        self.concurrency, self.timeout = concurrency, timeout
        self.retries, self.back_off, self.max_calls = retries, back_off, max_calls
        self.account = Account()
        self._headers = dict(headers or {})
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"HttpEngine({self.url!r})"

    def __call__(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """See `Engine`."""
        parts = zip(
            inputs_embeds.cpu().split(self.batch_rows),
            attention_mask.cpu().split(self.batch_rows),
            strict=True,
        )
        pool, stop = ThreadPoolExecutor(self.concurrency), threading.Event()

        def ask(embeds: Tensor, mask: Tensor) -> Tensor:
            try:
                return self._ask(embeds, mask, stop)
            except BaseException:
                stop.set()  # before this thread starts the next part
                raise

        try:
            futures = [pool.submit(ask, *part) for part in parts]
            for future in as_completed(futures):
                # raises the first failure without waiting for the other calls
                future.result()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        answers = [future.result() for future in futures]
        if len(widths := {answer.shape[1] for answer in answers}) > 1:
            raise EngineError(
                f"{self.url} answered calls with different numbers of logits per row: "
                f"{sorted(widths)}."
            )
        return torch.cat(answers)

    def _ask(self, embeds: Tensor, mask: Tensor, stop: threading.Event) -> Tensor:
        """Return the logits (R, V) of one call, with retries; empty once `stop` is set."""
        body = save({"inputs_embeds": embeds.contiguous(), "attention_mask": mask.contiguous()})
        for attempt in range(self.retries + 1):
            if stop.is_set():
                return torch.empty(0)  # the result is not used
            self._charge(attempt > 0)
            try:
                answer = self.post(body)
                break
            except RetryableError as failure:
                if attempt == self.retries:
                    raise EngineError(
                        f"{self.url} failed {attempt + 1} times in a row, the last time with: "
                        f"{failure}. What was learned up to the last checkpoint is safe: resume "
                        "from it once the endpoint answers again."
                    ) from failure
                pause = (
                    self.back_off
                    * 2 ** min(attempt, 100)
                    * random.Random(attempt).uniform(0.75, 1.25)
                )
                stop.wait(min(max(pause, failure.wait), _LONGEST_WAIT))
        if answer.dim() != 2 or len(answer) != len(embeds):
            raise EngineError(
                f"{self.url} answered with the shape {tuple(answer.shape)} for {len(embeds)} rows."
            )
        with self._lock:
            self.account.rows += len(embeds)
            self.account.tokens += mask.numel()
        return answer.float()

    def _charge(self, again: bool) -> None:
        with self._lock:
            if self.max_calls is not None and self.account.calls >= self.max_calls:
                raise EngineError(
                    f"{self.url} may not be called again: max_calls={self.max_calls} are used up."
                )
            self.account.calls += 1
            self.account.retries += again

    def post(self, body: bytes) -> Tensor:
        """Send one request and return its answer."""
        request = urllib.request.Request(
            self.url, body, {"Content-Type": "application/octet-stream"}
        )
        for name, value in self._headers.items():
            request.add_unredirected_header(name, value)
        start = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                content = read_body(response, start + self.timeout)
        except urllib.error.HTTPError as error:
            reason = b""
            with error, suppress(OSError, HTTPException):  # the code says enough
                reason = read_body(error, start + self.timeout, 300)[:300]
            message = f"HTTP {error.code}: {reason.decode(errors='replace')}"
            if error.code != 429 and error.code < 500:
                raise EngineError(f"{self.url} refused: {message}") from error
            raise RetryableError(
                message, seconds_to_wait(error.headers.get("Retry-After", ""))
            ) from error
        except (OSError, HTTPException) as error:
            # no connection, a broken one, or no answer in time
            raise RetryableError(f"{type(error).__name__}: {error}") from error
        finally:
            with self._lock:
                self.account.seconds += time.perf_counter() - start
                self.account.bytes_sent += len(body)
        with self._lock:
            self.account.bytes_received += len(content)
        try:
            return load(content)["logits"]
        except Exception as error:
            # safetensors has an exception of its own, and the key may be missing
            raise EngineError(
                f"{self.url} answered with {len(content)} bytes that are not logits as safetensors."
            ) from error
