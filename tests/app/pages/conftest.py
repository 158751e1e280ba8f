"""The pages are looked at through a real server, by a browser that keeps cookies."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from tests.live_server import LiveServer, live, shared_server

__all__ = ["live", "shared_server"]


@pytest.fixture
def visitor(live: LiveServer) -> Iterator[httpx2.Client]:
    """Nobody yet."""
    with httpx2.Client(base_url=live.url, trust_env=False) as made:
        yield made


@pytest.fixture
def user(live: LiveServer, visitor: httpx2.Client) -> httpx2.Client:
    """Signed in."""
    assert visitor.post("/login", data={"key": live.key}).status_code == 303
    return visitor
