"""The client and the CLI are tested against a real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from quantry.client import Client
from tests.live_server import LiveServer, live, shared_server

__all__ = ["live", "shared_server"]


@pytest.fixture
def client(live: LiveServer) -> Iterator[Client]:
    with Client(live.url, live.key) as made:
        yield made
