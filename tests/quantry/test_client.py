"""The client against a real server: every method once, and what it says when something is wrong."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from quantry.client import (
    Client,
    ConnectionFailed,
    InvalidRequest,
    ProblemError,
    QuantryError,
    Unauthorized,
    WaitTimeout,
)
from quantry.jobs import State
from quantry.recipe import RtnStep
from tests.cutting_proxy import CuttingProxy
from tests.live_server import MODEL, LiveServer, request

FILES = {"model.safetensors": b"weights" * 1000, "config.json": b"{}"}


def test_a_job_from_submit_to_report(live: LiveServer, client: Client) -> None:
    job = client.submit(request(labels={"team": "a"}))
    assert (job.state, job.spec.model.id, job.labels) == (State.QUEUED, "tiny", {"team": "a"})
    claim = live.claim(job.id)
    live.step(claim, State.QUANTIZING, "block 1 of 1", 1, 1)
    shown = client.job(job)
    assert (shown.state, shown.stage, shown.progress.done) == (State.QUANTIZING, "block 1 of 1", 1)
    manifest = live.succeed(claim, FILES)
    done = client.wait(job, timeout=30)
    assert done.state is State.SUCCEEDED
    assert done.quality is not None
    assert client.report(job).quality == done.quality
    assert "<!doctype html>" in client.report_html(job)
    assert [layer.name for layer in client.layers(job)] == ["h.0.fc1", "h.0.fc2"]
    assert [attempt.outcome for attempt in client.attempts(job)] == ["succeeded"]
    assert client.files(job) == manifest


def test_a_request_may_be_given_as_fields_or_as_the_spec_of_another_job(client: Client) -> None:
    first = client.submit(model=MODEL, recipe=[RtnStep(bits=3)], evaluation=None)
    second = client.submit(first.spec)
    assert second.id != first.id
    assert second.spec == first.spec
    assert second.spec.recipe == (RtnStep(bits=3),)


def test_a_submit_that_is_sent_twice_is_one_job(client: Client) -> None:
    first = client.submit(request(), idempotency_key="nightly-7")
    again = client.submit(request(), idempotency_key="nightly-7")
    assert again.id == first.id
    with pytest.raises(ProblemError, match="idempotency key"):
        client.submit(request(bits=3), idempotency_key="nightly-7")
    assert [job.id for job in client.jobs()] == [first.id]


def test_a_submit_whose_answer_is_lost_is_one_job(live: LiveServer, client: Client) -> None:
    with CuttingProxy(live.port, [300]) as proxy, Client(proxy.url, live.key) as distant:
        job = distant.submit(request())
    assert proxy.cut == 1
    assert [found.id for found in client.jobs()] == [job.id]


def test_a_dry_run_computes_nothing(client: Client) -> None:
    estimate = client.estimate(request())
    assert estimate.architecture == "OPTForCausalLM"
    assert sum(layer.quantized for layer in estimate.layers) == 6
    assert list(client.jobs()) == []


def test_lists_go_over_pages_and_filter(client: Client) -> None:
    made = [client.submit(request(labels={"n": str(n), "all": "yes"})).id for n in range(5)]
    assert [job.id for job in client.jobs(page_size=2)] == made[::-1]
    assert [job.id for job in client.jobs(labels={"n": "3", "all": "yes"})] == [made[3]]
    client.cancel(made[0])
    assert [job.id for job in client.jobs(state="cancelled")] == [made[0]]


def test_cancel_and_retry_are_idempotent(live: LiveServer, client: Client) -> None:
    job = client.submit(request())
    claim = live.claim(job.id)
    assert client.cancel(job).state is State.CANCELLING
    assert client.cancel(job).state is State.CANCELLING
    live.cancelled(claim)
    assert client.job(job).state is State.CANCELLED
    assert client.retry(job).state is State.QUEUED
    assert client.retry(job).state is State.QUEUED


def test_wait_follows_while_the_job_moves(live: LiveServer, client: Client) -> None:
    job = client.submit(request())
    seen: list[tuple[State, int]] = []
    shown = threading.Event()

    def follow() -> None:
        for state in client.watch(job, timeout=60):
            seen.append((state.state, state.progress.done))
            shown.set()

    watcher = threading.Thread(target=follow)
    watcher.start()
    claim = live.claim(job.id)
    for done in range(1, 4):
        live.step(claim, State.QUANTIZING, f"block {done} of 3", done, 3)
        while (State.QUANTIZING, done) not in seen:
            assert shown.wait(20)
            shown.clear()
    live.succeed(claim, FILES)
    watcher.join(20)
    assert seen[-1][0] is State.SUCCEEDED
    assert [done for state, done in seen if state is State.QUANTIZING] == [1, 2, 3]


def test_wait_gives_up_but_the_job_goes_on(client: Client) -> None:
    job = client.submit(request())
    with pytest.raises(WaitTimeout, match="still queued"):
        client.wait(job, timeout=0.3)
    assert client.job(job).state is State.QUEUED


def test_a_finished_job_is_not_waited_for(live: LiveServer, client: Client) -> None:
    job = client.submit(request())
    live.fail(live.claim(job.id))
    done = client.wait(job)
    assert done.state is State.FAILED
    assert done.error is not None
    assert done.error.retryable


def test_methods_name_their_papers(client: Client) -> None:
    methods = {method.method: method for method in client.methods()}
    assert {"rtn", "gptq", "bias_compensation"} <= set(methods)
    assert "2210.17323" in (methods["gptq"].paper or "")


def test_datasets_are_uploaded_once(client: Client, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("One sentence. " * 500, encoding="utf-8")
    made = client.upload_dataset(text)
    assert (made.name, made.bytes) == ("notes.txt", text.stat().st_size)
    assert client.upload_dataset(text).id == made.id
    assert [dataset.id for dataset in client.datasets()] == [made.id]
    client.delete_dataset(made)
    assert client.datasets() == ()


def test_a_wrong_field_is_named_before_anything_is_sent(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="bits") as caught:
        client.submit(model=MODEL, bits=7)
    assert caught.value.fields[0][0] == "bits"
    with pytest.raises(InvalidRequest, match="not both"):
        client.submit(request(), bits=4)


def test_a_refusal_carries_the_problem(client: Client) -> None:
    with pytest.raises(ProblemError) as caught:
        client.submit(request(group_size=24))
    error = caught.value
    assert error.status == 422
    assert error.type.startswith("/problems/")
    assert "group_size" in str(error)
    with pytest.raises(ProblemError) as caught:
        client.job("job_00000000-0000-7000-8000-000000000000")
    assert caught.value.status == 404


def test_a_wrong_key_says_what_to_do(live: LiveServer) -> None:
    with Client(live.url, "qz_nonsense") as stranger, pytest.raises(Unauthorized, match="QUANTRY_API_KEY"):
        list(stranger.jobs())


def test_jobs_of_others_are_not_there(live: LiveServer, client: Client) -> None:
    job = client.submit(request())
    with Client(live.url, live.new_key("somebody else")) as other:
        assert list(other.jobs()) == []
        with pytest.raises(ProblemError) as caught:
            other.cancel(job)
        assert caught.value.status == 404


def test_a_server_that_is_away_says_what_to_do(live: LiveServer) -> None:
    live.stop()
    try:
        with (
            Client(live.url, live.key, retries=1) as client,
            pytest.raises(ConnectionFailed, match="quantry-server"),
        ):
            client.methods()
    finally:
        live.start()


def test_a_server_that_comes_back_is_not_missed(live: LiveServer) -> None:
    live.stop()
    threading.Timer(0.6, live.start).start()
    with Client(live.url, live.key, retries=6) as client:
        job = client.submit(request())
        assert [found.id for found in client.jobs()] == [job.id]


@pytest.mark.parametrize("url", ["ftp://host", "host:8000", "http://", "http://[::1"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(QuantryError, match="URL"):
        Client(url)


def test_the_key_of_this_machine_is_found_and_stays_on_it(
    live: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "api-key").write_text(live.key + "\n")
    monkeypatch.delenv("QUANTRY_API_KEY", raising=False)
    monkeypatch.setenv("QUANTRY_DATA", str(tmp_path))
    monkeypatch.setenv("QUANTRY_URL", live.url)
    with Client() as client:
        assert list(client.jobs()) == []
    with Client("http://192.0.2.1:8000") as elsewhere:
        assert "Authorization" not in elsewhere._connection._http.headers


def test_a_client_needs_no_torch() -> None:
    code = (
        "import sys, quantry.client, quantry.cli; print([m for m in sys.modules if m in ('torch', 'numpy')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_events_come_in_order_and_from_where_one_asks(live: LiveServer, client: Client) -> None:
    job = client.submit(request())
    claim = live.claim(job.id)
    live.log(claim, "one")
    live.log(claim, "two")
    live.fail(claim)
    events = list(client.events(job))
    assert [event.id for event in events] == list(range(1, len(events) + 1))
    assert [event.data["message"] for event in events if event.kind == "log"] == ["one", "two"]
    assert list(client.events(job, follow=True)) == events
    assert list(client.events(job, follow=True, after=2)) == events[2:]
