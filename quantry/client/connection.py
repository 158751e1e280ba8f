"""One connection to a server: where it is, who we are, and what is tried again."""

from __future__ import annotations

import ipaddress
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from quantry.client.errors import ConnectionFailed, QuantryError, problem_of

DEFAULT_URL = "http://127.0.0.1:8000"
BUSY = (502, 503, 504)
FATAL = (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError)


def resolve_url(url: str | None) -> httpx2.URL:
    """The argument, else QUANTRY_URL, else this machine. Raises QuantryError if it is no http(s) URL."""
    text = url or os.environ.get("QUANTRY_URL") or DEFAULT_URL
    try:
        parsed = httpx2.URL(text.rstrip("/"))
    except httpx2.InvalidURL as error:
        raise QuantryError(f"{text!r} is not a URL ({error}); give one such as {DEFAULT_URL}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise QuantryError(f"{text!r} is not an http or https URL; give one such as {DEFAULT_URL}")
    return parsed


def resolve_key(key: str | None, url: httpx2.URL) -> str | None:
    """The argument, else QUANTRY_API_KEY, else the file `api-key` of the folder QUANTRY_DATA.

    The file holds the key of the server on this machine, so it is read for loopback addresses only: a
    key never goes to a host that it was not made for.
    """
    found = key or os.environ.get("QUANTRY_API_KEY")
    if found:
        return found.strip()
    file = Path(os.environ.get("QUANTRY_DATA") or "quantry-data") / "api-key"
    if is_loopback(url.host) and file.is_file():
        return file.read_text().strip()
    return None


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def backoff_s(attempt: int, *, longest: float = 10.0) -> float:
    """Seconds before try number `attempt` (from 1): doubling from a quarter, with jitter against herds."""
    return min(longest, 0.25 * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)


class Connection:
    """Sends requests; an answer below 400 comes back, all else is a QuantryError.

    Every request here may be sent twice: reads by nature, submits by their Idempotency-Key, cancels and
    retries because the server makes them so, uploads because equal bytes are one dataset.
    """

    def __init__(self, url: httpx2.URL, key: str | None, *, timeout: float, retries: int) -> None:
        headers = {"User-Agent": "quantry-client", "Accept": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self.url = url
        self.retries = retries
        self._timeout = timeout
        self._http = httpx2.Client(
            base_url=url, headers=headers, timeout=timeout, trust_env=not is_loopback(url.host)
        )

    def close(self) -> None:
        self._http.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        content: Callable[[], Iterable[bytes]] | None = None,
        params: Mapping[str, str | int] | None = None,
        headers: Mapping[str, str] | None = None,
        extra_s: float = 0.0,
    ) -> httpx2.Response:
        """Send and read whole. content: makes the body anew for each try; extra_s: for a long poll."""
        allowed = self.retries
        for attempt in range(1, allowed + 2):
            try:
                response = self._http.request(
                    method,
                    path,
                    json=json,
                    content=content() if content else None,
                    params=params,
                    headers=headers,
                    timeout=httpx2.Timeout(self._timeout, read=self._timeout + extra_s),
                )
            except httpx2.TransportError as error:
                if attempt > allowed or isinstance(error, FATAL):
                    raise self.failed(error) from error
                time.sleep(backoff_s(attempt))
                continue
            if response.status_code in BUSY and attempt <= allowed:
                time.sleep(_retry_after_s(response, attempt))
                continue
            if response.is_error:
                raise problem_of(response)
            return response
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def stream(
        self,
        path: str,
        *,
        params: Mapping[str, str | int] | None = None,
        headers: Mapping[str, str] | None = None,
        read_s: float | None = None,
    ) -> Iterator[httpx2.Response]:
        """GET a body in pieces, once; breaks show as httpx2.TransportError, refusals as ProblemError."""
        timeout = httpx2.Timeout(self._timeout, read=read_s or self._timeout)
        with self._http.stream(
            "GET", path, params=params, headers=headers, timeout=timeout, follow_redirects=True
        ) as response:
            if response.is_error:
                response.read()
                raise problem_of(response)
            yield response

    def failed(self, error: httpx2.TransportError) -> ConnectionFailed:
        """What to tell a user about a connection that broke, or never was."""
        reason = str(error) or type(error).__name__
        hint = (
            "Is it running? `quantry-server serve` starts one here; QUANTRY_URL or --url names another."
            if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
            else "The connection was lost: try again, and look into the server's log if it stays so."
        )
        return ConnectionFailed(f"no answer from {self.url}: {reason}. {hint}")


def _retry_after_s(response: httpx2.Response, attempt: int) -> float:
    """What the server asks for, at most 30 s; else our own pace."""
    asked = response.headers.get("Retry-After", "")
    return min(30.0, float(asked)) if asked.isdigit() else backoff_s(attempt)
