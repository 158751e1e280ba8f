"""Events: a stream that misses nothing and ends with the job, and the same as a list."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from app.api import events as events_module
from app.shared import leases
from app.shared.leases import Step
from quantry.jobs import Event, EventPage, Progress, State
from tests.app.api.factories import Jobs

STREAM = {"Accept": "text/event-stream"}


def messages(response: httpx2.Response) -> Iterator[dict[str, str]]:
    """The messages of a stream, field by field; comments come as {"comment": ...}."""
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        if not line:
            if fields:
                yield fields
            fields = {}
        elif line.startswith(":"):
            fields["comment"] = line[1:].strip()
        else:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")


def beat(sessions: Any, claim: Any, state: State, done: int, *extra: tuple[str, dict[str, Any]]) -> None:
    with sessions() as session:
        step = Step(state, f"step {done}", Progress(done=done, total=9))
        leases.heartbeat(session, claim, step=step, events=extra)


def test_the_list_goes_on_after_what_is_known(client: TestClient, made: Jobs, sqlite_sessions: Any) -> None:
    claim = made.running()
    for done in range(4):
        beat(sqlite_sessions, claim, State.QUANTIZING, done)
    url = f"/v1/jobs/{claim.job_id}/events"
    everything = EventPage.model_validate_json(client.get(url).content).items
    assert [event.id for event in everything] == list(range(1, len(everything) + 1))
    rest = EventPage.model_validate_json(client.get(url, headers={"Last-Event-ID": "2"}).content).items
    assert rest == everything[2:]
    assert (
        client.get(url, params={"after": 2}).json() == client.get(url, headers={"Last-Event-ID": "2"}).json()
    )
    assert len(client.get(url, params={"limit": 1}).json()["items"]) == 1
    assert client.get(url, params={"after": 999}).json() == {"items": []}


def test_a_stream_replays_follows_and_ends_with_the_job(
    live: httpx2.Client, made: Jobs, sqlite_sessions: Any
) -> None:
    claim = made.running()
    beat(sqlite_sessions, claim, State.CALIBRATING, 1)

    def work() -> None:
        time.sleep(0.4)
        for done in range(3):
            beat(sqlite_sessions, claim, State.QUANTIZING, done)
        made.finish(claim, {"a": b"x"})

    thread = threading.Thread(target=work)
    with live.stream("GET", f"/v1/jobs/{claim.job_id}/events", headers=STREAM) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        assert response.headers["Cache-Control"] == "no-cache"
        thread.start()
        found = [message for message in messages(response) if "data" in message]
    thread.join()
    streamed = [Event.model_validate_json(message["data"]) for message in found]
    listed = EventPage.model_validate_json(live.get(f"/v1/jobs/{claim.job_id}/events").content).items
    assert tuple(streamed) == listed
    assert [message["id"] for message in found] == [str(event.id) for event in listed]
    assert [message["event"] for message in found] == [event.kind for event in listed]
    assert any(event.data.get("state") == "succeeded" for event in streamed)


def test_a_stream_takes_up_where_the_last_one_broke(live: httpx2.Client, made: Jobs) -> None:
    job_id = made.succeeded()
    url = f"/v1/jobs/{job_id}/events"
    with live.stream("GET", url, headers=STREAM) as response:
        first = next(messages(response))
    with live.stream("GET", url, headers={**STREAM, "Last-Event-ID": first["id"]}) as response:
        rest = list(messages(response))
    assert [int(message["id"]) for message in rest] == list(range(2, 2 + len(rest)))
    with live.stream("GET", url, headers={**STREAM, "Last-Event-ID": rest[-1]["id"]}) as response:
        assert list(messages(response)) == []  # nothing more, and it ends


def test_a_quiet_stream_is_kept_alive(
    live: httpx2.Client, made: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_module, "HEARTBEAT_S", 0.1)
    job_id = made.queued()
    with live.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as response:
        stream = messages(response)
        assert next(stream)["event"] == "state"
        assert next(stream) == {"comment": "keep-alive"}


def test_a_stream_ends_when_the_server_stops(live: httpx2.Client, made: Jobs, app: Any) -> None:
    job_id = made.queued()
    with live.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as response:
        stream = messages(response)
        next(stream)
        while not len(app.state.services.watcher):
            time.sleep(0.01)
        app.state.services.watcher.close()
        rest = list(stream)
    assert all("comment" in message for message in rest)


def test_many_batches_are_streamed_whole(live: httpx2.Client, made: Jobs, sqlite_sessions: Any) -> None:
    claim = made.running()
    lines = [("log", {"message": f"line {number}"}) for number in range(1200)]
    beat(sqlite_sessions, claim, State.CALIBRATING, 0, *lines)
    live.post(f"/v1/jobs/{claim.job_id}/cancel")
    with sqlite_sessions() as session:
        leases.finish(session, claim, leases.Cancelled())
    with live.stream("GET", f"/v1/jobs/{claim.job_id}/events", headers=STREAM) as response:
        ids = [int(message["id"]) for message in messages(response)]
    assert ids == list(range(1, len(ids) + 1))
    assert len(ids) > 1200
    logs = live.get(f"/v1/jobs/{claim.job_id}/logs").text.splitlines()
    assert len(logs) == 1200


def test_head_of_a_stream_ends(live: httpx2.Client, made: Jobs) -> None:
    response = live.head(f"/v1/jobs/{made.queued()}/events", headers=STREAM)
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")


@pytest.mark.parametrize("last", ["x", "-1", "1.5", "9" * 30])
def test_a_bad_last_event_id_is_refused(client: TestClient, made: Jobs, last: str) -> None:
    response = client.get(f"/v1/jobs/{made.queued()}/events", headers={"Last-Event-ID": last})
    assert response.status_code == 422


def test_what_is_neither_json_nor_a_stream_is_406(client: TestClient, made: Jobs) -> None:
    response = client.get(f"/v1/jobs/{made.queued()}/events", headers={"Accept": "image/png"})
    assert (response.status_code, response.json()["type"]) == (406, "/problems/not-acceptable")


def test_logs_are_lines_of_text(client: TestClient, made: Jobs, sqlite_sessions: Any) -> None:
    claim = made.running()
    extra = [
        ("log", {"message": "two\nlines"}),
        ("warning", {"layer": "a", "damping": 0.1}),
        ("log", {"tail": "Killed\n"}),  # the end of what a child wrote
    ]
    beat(sqlite_sessions, claim, State.CALIBRATING, 0, *extra)
    response = client.get(f"/v1/jobs/{claim.job_id}/logs")
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    first, second, third, fourth = response.text.splitlines()
    assert first.endswith(("Z log     two", "+00:00 log     two"))
    assert second == first[: -len("two")] + "lines"
    assert third.endswith('warning {"layer": "a", "damping": 0.1}')
    assert fourth.endswith("log     Killed")
