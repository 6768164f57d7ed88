"""A JSON endpoint behind HTTP: concurrent calls, a deadline for each, bounded retries, costs."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError, EngineError

if TYPE_CHECKING:
    import httpx

_LONGEST_WAIT = 60.0  # seconds between two attempts
_SHOWN = 300  # characters of an answer that errors show


class RetryableError(Exception):
    """A failed call that may succeed if it is repeated: why, and after how many seconds."""


@dataclass
class Account:
    """Costs of an engine: calls with their retries, answered rows and their tokens with those
    generated and without padding, bytes of bodies, and the latency summed over calls.
    """

    calls: int = 0
    retries: int = 0
    rows: int = 0
    tokens: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0


class Endpoint:
    """Posts JSON to a server; see `VllmEngine`."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        concurrency: int = 4,
        timeout: float = 60.0,
        retries: int = 5,
        back_off: float = 0.5,
        max_calls: int | None = None,
        max_answer_bytes: int = 1 << 26,
    ) -> None:
        self.url, self._key = checked_url(base_url), api_key
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigurationError("api_key must be a text of one line in ASCII.")
        self.concurrency = at_least("concurrency", concurrency, 1)
        self.retries = at_least("retries", retries, 0)
        self.max_calls = None if max_calls is None else at_least("max_calls", max_calls, 0)
        self.max_answer_bytes = at_least("max_answer_bytes", max_answer_bytes, 1)
        self.timeout = at_least("timeout", timeout, 1e-3, "seconds")
        self.back_off = at_least("back_off", back_off, 0, "seconds")
        self.account = Account()

    def post(
        self, path: str, bodies: Sequence[bytes], retries: int | None = None, done: str = ""
    ) -> list[bytes]:
        """Return the answers to JSON bodies, in their order; the first failure ends all calls, but
        not a refusal with the text `done`, which a repeated call gets.
        """
        from anyio.from_thread import start_blocking_portal

        retries = self.retries if retries is None else retries
        with start_blocking_portal() as portal:  # also where an event loop runs, as in notebooks
            return portal.call(self._all, path, bodies, retries, done)

    async def _all(
        self, path: str, bodies: Sequence[bytes], retries: int, done: str
    ) -> list[bytes]:
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        left, answers = iter(enumerate(bodies)), [b""] * len(bodies)

        async def ask() -> None:
            for i, body in left:
                answers[i] = await self._ask(client, path, body, retries, done)

        async with _httpx().AsyncClient(headers=headers, timeout=None, verify=_tls()) as client:
            tasks = [asyncio.create_task(ask()) for _ in bodies[: self.concurrency]]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
        return answers

    async def _ask(
        self, client: httpx.AsyncClient, path: str, body: bytes, retries: int, done: str
    ) -> bytes:
        """Return the answer of one call, with retries."""
        for attempt in range(retries + 1):
            if self.account.calls == self.max_calls:
                used = f"max_calls={self.max_calls} are used up"
                raise EngineError(f"{self.url} may not be called again: {used}.")
            self.account.calls += 1
            self.account.retries += attempt > 0
            start = time.perf_counter()
            try:
                async with asyncio.timeout(self.timeout):
                    return await self._once(client, path, body, done if attempt else "")
            except TimeoutError:
                reason, wait = f"TimeoutError: no answer in {self.timeout:g} seconds", 0.0
            except RetryableError as error:
                reason, wait = error.args
            finally:
                self.account.seconds += time.perf_counter() - start
                self.account.bytes_sent += len(body)
            pause = self.back_off * 2 ** min(attempt, 100) * random.SystemRandom().uniform(0.5, 1.5)
            if attempt < retries:
                await asyncio.sleep(min(max(pause, wait), _LONGEST_WAIT))
        raise EngineError(
            f"{self.url} failed {retries + 1} times in a row, the last time with: {reason}. What "
            "was learned up to the last checkpoint is safe: resume from it once the endpoint "
            "answers again."
        )

    async def _once(self, client: httpx.AsyncClient, path: str, body: bytes, done: str) -> bytes:
        """Send one request and return the body of its answer."""
        content, response, most = bytearray(), None, self.max_answer_bytes
        try:
            async with client.stream("POST", self.url + path, content=body) as response:
                most = most if response.status_code == 200 else _SHOWN
                async for part in response.aiter_raw():
                    content += part
                    if len(content) > most:
                        break
        except _httpx().HTTPError as error:
            reason = f"{type(error).__name__}: {self._shown(str(error))}"
            if "CERTIFICATE_VERIFY_FAILED" in reason:
                raise EngineError(f"{self.url} is not trusted: {reason}.") from None
            if response is None or response.status_code == 200:
                raise RetryableError(reason, 0.0) from None
        assert response is not None
        self.account.bytes_received += len(content)
        code = response.status_code
        message = f"HTTP {code}: {self._shown(content.decode(errors='replace'))}"
        if code == 429 or code >= 500:
            raise RetryableError(message, seconds_to_wait(response.headers.get("Retry-After", "")))
        if code != 200 and not (done and done in message):
            raise EngineError(f"{self.url}{path} refused: {message}")
        if len(content) > most:
            raise EngineError(f"{self.url} answered with more than max_answer_bytes={most}.")
        return bytes(content)

    def _shown(self, text: str) -> str:
        """Return the start of a text in one line, without the key, which a server may repeat."""
        line = " ".join(text.split())
        return (line.replace(self._key, "***") if self._key else line)[:_SHOWN]


def _httpx() -> Any:
    try:
        import httpx
    except ImportError as error:
        raise ImportError("Servers are asked with httpx: pip install 'hf_flops[http]'.") from error
    return httpx


@cache
def _tls() -> ssl.SSLContext:
    """Return what certificates are checked by; it takes a tenth of a second to make."""
    return _httpx().create_ssl_context()


def checked_url(url: str) -> str:
    """Return a valid URL, without a slash at its end; an error does not show a password in it."""
    if "@" in str(url):
        raise ConfigurationError("base_url holds a name or password before '@': pass api_key=.")
    with suppress(_httpx().InvalidURL, TypeError):
        parts = _httpx().URL(url)
        plain = url.isascii() and " " not in url and not parts.query and not parts.fragment
        plain = plain and 0 < (parts.port or 80) < 65536 and bool(parts.host)
        if plain and parts.scheme in ("http", "https"):
            return url.rstrip("/")
    raise ConfigurationError(
        f"base_url={url!r} must be http:// or https:// with a host, in ASCII without spaces."
    )


def at_least(name: str, value: object, least: float, unit: str | None = None) -> Any:
    """Return a whole number, or one with a unit, if it is large enough."""
    kind: Any = int if unit is None else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value < 1e9:
        what = "a whole number" if unit is None else f"a number of {unit}"
        raise ConfigurationError(f"{name}={value!r} must be {what}, {least} or more.")
    return value


def seconds_to_wait(retry_after: str) -> float:
    """Return the seconds to wait that a Retry-After header, a number or a date, asks for."""
    with suppress(ValueError):
        return float(retry_after)
    with suppress(ValueError, TypeError, OverflowError):
        return parsedate_to_datetime(retry_after).timestamp() - time.time()
    return 0.0
