"""HTTP for the client: checks of a URL and headers, bodies within a time limit, `Retry-After`."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http.client import IncompleteRead
from typing import Any
from urllib.parse import urlsplit

from ..errors import ConfigurationError


class RetryableError(Exception):
    """A failed call that may succeed if it is repeated after `wait` seconds or more."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def check_url(url: str) -> None:
    """Raise an error for an invalid URL."""
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (ValueError, TypeError, AttributeError):  # no text, no host, or no number for a port
        usable = False
    if not usable or not re.fullmatch("[!-~]+", url):
        raise ConfigurationError(
            f"url={url!r} must be http:// or https:// with a host, in ASCII without spaces."
        )
    if "@" in parts.netloc:
        raise ConfigurationError(
            "url holds a user's name or password before '@': send them with headers= instead."
        )


def check_headers(headers: Mapping[str, str]) -> None:
    """Raise an error for invalid headers, without showing their values, which may be secret."""
    if not isinstance(headers, Mapping):
        raise ConfigurationError(
            f"headers is a {type(headers).__name__}, where a mapping of names to texts is wanted."
        )
    for name, value in headers.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII):
            raise ConfigurationError(f"headers has {name!r}, which is not the name of a header.")
        if not isinstance(value, str) or not re.fullmatch(r"[\t -~\xa0-\xff]*", value):
            raise ConfigurationError(f"headers[{name!r}] must be a text of one line in Latin-1.")


def read_body(response: Any, deadline: float, most: float = float("inf")) -> bytes:
    """Return the body of an answer, or its first bytes; raises TimeoutError at the deadline."""
    content = bytearray()
    while len(content) < most and (chunk := response.read1(1 << 16)):
        content += chunk
        if response.length != 0 and time.perf_counter() > deadline:
            raise TimeoutError("the answer takes too long")
    if len(content) < most and response.length:
        raise IncompleteRead(bytes(content), response.length)
    return bytes(content)


def seconds_to_wait(retry_after: str) -> float:
    """Return the seconds to wait that a Retry-After header, a number or a date, asks for."""
    with suppress(ValueError):
        return float(retry_after)
    with suppress(ValueError, TypeError, OverflowError):
        return parsedate_to_datetime(retry_after).timestamp() - time.time()
    return 0.0
