"""An engine behind HTTP: batches, several calls at a time, time limits, bounded retries, and an account of what it cost."""

from __future__ import annotations

import random
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..errors import EngineError

_LONGEST_WAIT = 60.0  # seconds between two attempts


@dataclass
class Account:
    """What an endpoint was asked for.

    Attributes:
        calls: requests that were sent, repeated ones included.
        retries: those of them that repeated a failed one.
        rows: rows that were answered.
        tokens: their tokens, padding included.
        bytes_sent: of the bodies of requests.
        bytes_received: of the bodies of answers.
        seconds: between sending a request and its answer, summed over calls.
    """

    calls: int = 0
    retries: int = 0
    rows: int = 0
    tokens: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0


class _Failure(Exception):
    """A call that may succeed if it is repeated, after so many seconds at least."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class HttpEngine:
    """An engine that `EngineServer`, or anything that speaks as it does, serves.

    A call posts `inputs_embeds` and `attention_mask` of a few rows as safetensors, and gets `logits` as safetensors back.

    Args:
        url: where to post to.
        batch_rows: rows of a call.
        concurrency: calls at a time.
        timeout: seconds until a call that is not answered has failed.
        retries: how often a call is repeated after 429, a server's error, a broken connection or a timeout.
        back_off: seconds before the first repetition, doubled for each further one; a server's Retry-After counts if longer.
        max_calls: calls in the lifetime of this object, repeated ones included; None for no limit.

    Attributes:
        account: what was asked for so far.

    Raises:
        EngineError: the endpoint, which is named, refused, kept failing or answered with nonsense, or `max_calls` is spent.
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
    ) -> None:
        self.url, self.batch_rows, self.concurrency, self.timeout = url, batch_rows, concurrency, timeout
        self.retries, self.back_off, self.max_calls = retries, back_off, max_calls
        self.account = Account()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"HttpEngine({self.url!r})"

    def __call__(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """See `Engine`."""
        parts = list(
            zip(inputs_embeds.cpu().split(self.batch_rows), attention_mask.cpu().split(self.batch_rows), strict=True)
        )
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._ask, *part) for part in parts]
            try:
                return torch.cat([future.result() for future in futures])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Return the logits (R, V) of one call, repeated as often as is allowed."""
        body = save({"inputs_embeds": embeds.contiguous(), "attention_mask": mask.contiguous()})
        for attempt in range(self.retries + 1):
            self._charge(attempt > 0)
            try:
                answer = self._post(body)
                break
            except _Failure as failure:
                if attempt == self.retries:
                    raise EngineError(
                        f"{self.url} failed {attempt + 1} times in a row, the last time with: {failure}. What was learned "
                        "up to the last checkpoint is safe: resume from it once the endpoint answers again."
                    ) from failure
                pause = self.back_off * 2**attempt * random.Random(attempt).uniform(0.75, 1.25)
                time.sleep(min(max(pause, failure.wait), _LONGEST_WAIT))
        if answer.dim() != 2 or len(answer) != len(embeds):
            raise EngineError(f"{self.url} answered with the shape {tuple(answer.shape)} for {len(embeds)} rows.")
        with self._lock:
            self.account.rows += len(embeds)
            self.account.tokens += mask.numel()
        return answer.float()

    def _charge(self, again: bool) -> None:
        with self._lock:
            if self.max_calls is not None and self.account.calls >= self.max_calls:
                raise EngineError(f"{self.url} may not be called again: max_calls={self.max_calls} are used up.")
            self.account.calls += 1
            self.account.retries += again

    def _post(self, body: bytes) -> Tensor:
        """Send one request and return its answer."""
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/octet-stream"})
        start = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            message = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
            if error.code != 429 and error.code < 500:
                raise EngineError(f"{self.url} refused: {message}") from error
            wait = error.headers.get("Retry-After", "")
            raise _Failure(message, float(wait) if wait.isdigit() else 0.0) from error
        except (OSError, HTTPException) as error:  # no connection, a broken one, or no answer in time
            raise _Failure(f"{type(error).__name__}: {error}") from error
        finally:
            with self._lock:
                self.account.seconds += time.perf_counter() - start
                self.account.bytes_sent += len(body)
        with self._lock:
            self.account.bytes_received += len(content)
        try:
            return load(content)["logits"]
        except Exception as error:  # safetensors has an exception of its own, and the key may be missing
            raise EngineError(
                f"{self.url} answered with {len(content)} bytes that are not logits as safetensors."
            ) from error
