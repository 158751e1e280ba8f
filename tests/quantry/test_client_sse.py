"""The event stream: decoding in any pieces, and following through cut connections and restarts."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantry.client import Client, ProblemError
from quantry.client.sse import Message, decode
from quantry.jobs import State
from tests.cutting_proxy import CuttingProxy
from tests.live_server import LiveServer, request

STREAM = (
    ": hello\n\n"
    "id: 1\nevent: state\ndata: {\"a\": 1}\n\n"
    "id: 2\r\ndata: two\r\ndata: lines\r\n\r\n"
    "data\rdata:  indented\r\r"
    "id: bad\0id\nevent: log\ndata: ünï\u2028code\n\n"
    "retry: 10\n\n"
    "id: 9\ndata: never finished"
).encode()  # fmt: skip
MESSAGES = [
    Message("state", '{"a": 1}', "1"),
    Message("message", "two\nlines", "2"),
    Message("message", "\n indented", "2"),
    Message("log", "ünï\u2028code", "2"),
]


def messages(chunks: list[bytes]) -> list[Message]:
    return [message for message in decode(chunks) if message is not None]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_pieces_make_no_difference(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    assert messages([STREAM[a:b] for a, b in pairwise(edges)]) == MESSAGES


def test_one_byte_at_a_time() -> None:
    assert messages([bytes([byte]) for byte in STREAM]) == MESSAGES


def test_a_comment_wakes_the_reader() -> None:
    assert list(decode([b": keep-alive\n\n", b"data: x\n\n"])) == [None, Message("message", "x", ""), None]


def test_following_survives_cut_connections(live: LiveServer, client: Client) -> None:
    """Each connection is cut after a few hundred bytes; every event still comes, once and in order."""
    job = client.submit(request())
    claim = live.claim(job.id)
    for number in range(12):
        live.log(claim, f"line {number} " + "x" * 60)
    live.fail(claim)
    with CuttingProxy(live.port, [700, 900, 1100, 1500]) as proxy, Client(proxy.url, live.key) as distant:
        events = list(distant.events(job, follow=True))
    assert [event.id for event in events] == list(range(1, events[-1].id + 1))
    lines = [str(event.data["message"]) for event in events if event.kind == "log"]
    assert [int(line.split()[1]) for line in lines] == list(range(12))
    assert proxy.cut >= 3


def test_following_survives_a_restart_of_the_server(live: LiveServer, client: Client) -> None:
    job = client.submit(request())
    claim = live.claim(job.id)
    found: list[str] = []
    first = threading.Event()

    def follow() -> None:
        for event in client.events(job, follow=True):
            if event.kind == "log":
                found.append(str(event.data["message"]))
                first.set()

    follower = threading.Thread(target=follow)
    follower.start()
    live.log(claim, "before")
    assert first.wait(20)
    live.stop()
    live.log(claim, "while it was away")
    live.start()
    live.log(claim, "after")
    live.fail(claim)
    follower.join(30)
    assert not follower.is_alive()
    assert found == ["before", "while it was away", "after"]


def test_following_a_job_that_is_not_there_ends_at_once(client: Client) -> None:
    with pytest.raises(ProblemError) as caught:
        list(client.events("job_00000000-0000-7000-8000-000000000000", follow=True))
    assert caught.value.status == 404


def test_waiting_works_where_streams_do_not_come_through(live: LiveServer) -> None:
    """A proxy that turns event streams into something else: long polls tell the same."""
    broken = (b"text/event-stream", b"text/broken-stream")
    with (
        CuttingProxy(live.port, [], replace=broken) as proxy,
        Client(proxy.url, live.key) as client,
    ):
        job = client.submit(request())
        claim = live.claim(job.id)
        ender = threading.Timer(0.7, live.fail, [claim])
        ender.start()
        states = [shown.state for shown in client.watch(job, timeout=60)]
        ender.join()
    assert states[0] is State.PREPARING
    assert states[-1] is State.FAILED
