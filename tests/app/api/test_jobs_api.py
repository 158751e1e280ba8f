"""Jobs over HTTP: submit once, find again, poll cheaply, cancel, retry; and nobody else's."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from app.shared import leases
from app.shared.leases import Step
from quantry.contract import JobSpec
from quantry.jobs import Failed, JobError, JobRead, Progress, State
from tests.app.api.factories import REQUEST, Jobs, Keys


def submit(client: TestClient, headers: dict[str, str] | None = None, **fields: Any) -> JobRead:
    response = client.post("/v1/jobs", json={**REQUEST, **fields}, headers=headers)
    assert response.status_code == 202, response.text
    assert response.headers["Location"] == f"/v1/jobs/{response.json()['id']}"
    return JobRead.model_validate_json(response.content)


def test_submit_answers_with_the_full_form(client: TestClient) -> None:
    job = submit(client, correction="bias_compensation", labels={"team": "a"})
    assert job.state == State.QUEUED
    assert [step.method for step in job.spec.recipe] == ["gptq", "bias_compensation"]
    assert job.spec.format == "compressed-tensors"
    assert job.spec.evaluation is not None
    assert job.spec.evaluation.sequence_length == 16
    assert client.get(f"/v1/jobs/{job.id}").json() == job.model_dump(mode="json")
    again = submit(client)  # the full form is a request too
    full = again.spec.model_dump(mode="json")
    response = client.post("/v1/jobs", json=full)
    assert response.status_code == 202
    assert JobSpec.model_validate(response.json()["spec"]) == again.spec


def test_an_idempotency_key_makes_one_job(client: TestClient) -> None:
    key = {"Idempotency-Key": "k-1"}
    first = client.post("/v1/jobs", json=REQUEST, headers=key)
    second = client.post("/v1/jobs", json={**REQUEST, "method": None}, headers=key)  # the same request
    assert first.json()["id"] == second.json()["id"]
    assert "Idempotency-Replayed" not in first.headers
    assert second.headers["Idempotency-Replayed"] == "true"
    assert client.get("/v1/jobs").json()["items"] == [first.json()]


def test_an_idempotency_key_for_another_request_is_refused(client: TestClient, other: TestClient) -> None:
    key = {"Idempotency-Key": "k-1"}
    submit(client, key)
    response = client.post("/v1/jobs", json={**REQUEST, "bits": 3}, headers=key)
    assert response.status_code == 422
    assert response.json()["type"] == "/problems/idempotency-conflict"
    assert (
        other.post("/v1/jobs", json={**REQUEST, "bits": 3}, headers=key).status_code == 202
    )  # keys are the owner's


def test_a_repeated_submit_does_not_need_the_model_again(client: TestClient, settings_models: Any) -> None:
    key = {"Idempotency-Key": "k-1"}
    job = submit(client, key)
    settings_models.rename(settings_models.parent / "moved")
    assert submit(client, key).id == job.id
    assert client.post("/v1/jobs", json=REQUEST).status_code == 422


@pytest.fixture
def settings_models(settings: Any) -> Any:
    return settings.model_roots[0]


def test_many_submits_at_once_with_one_key_make_one_job(live: httpx2.Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda _: live.post("/v1/jobs", json=REQUEST, headers={"Idempotency-Key": "same"}), range(16)
            )
        )
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "with space", "t\u00e4st"])
def test_a_bad_idempotency_key_is_refused(client: TestClient, key: str) -> None:
    response = client.post("/v1/jobs", json=REQUEST, headers={"Idempotency-Key": key.encode()})
    assert response.status_code == 422
    assert response.json()["errors"][0]["in"] == "header"


@pytest.mark.parametrize(
    ("method", "path", "known"),
    [
        ("GET", "/v1/jobs?sate=failed", "limit, cursor, state, label"),
        ("GET", "/v1/jobs/job_00000000-0000-7000-8000-000000000000?wait=3", "no parameter"),
        ("POST", "/v1/datasets?name=a.txt&kind=text", "name"),
    ],
)
def test_an_unknown_query_parameter_is_refused(
    client: TestClient, method: str, path: str, known: str
) -> None:
    """A filter with a typing mistake would list every job."""
    response = client.request(method, path)
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert error["in"] == "query"
    assert f"{error['path']}=" in path
    assert known in error["detail"]


def test_probes_take_any_query(client: TestClient) -> None:
    assert client.get("/healthz?from=balancer").status_code == 200


def test_the_queue_of_an_owner_is_bounded(client: TestClient, app: Any) -> None:
    services = app.state.services
    tight = services.settings.model_copy(update={"max_unfinished_jobs": 2})
    object.__setattr__(services, "settings", tight)
    submit(client)
    submit(client)
    response = client.post("/v1/jobs", json=REQUEST)
    assert response.status_code == 429
    assert response.json()["type"] == "/problems/queue-full"
    assert int(response.headers["Retry-After"]) > 0


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8])
def test_pages_show_each_job_once_newest_first(client: TestClient, made: Jobs, limit: int) -> None:
    expected = [made.queued() for _ in range(7)][::-1]
    made.queued("bob")
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = client.get(
            "/v1/jobs", params={"limit": limit, **({"cursor": cursor} if cursor else {})}
        ).json()
        assert len(page["items"]) <= limit
        seen += [job["id"] for job in page["items"]]
        cursor = page["next"]
        if cursor is None:
            break
        made.queued()  # comes before the first page, so it shifts nothing
    assert seen == expected


def test_lists_filter_by_state_and_label(client: TestClient, made: Jobs) -> None:
    plain = made.queued()
    a = made.queued(labels={"team": "a", "run": "1"})
    b = made.queued(labels={"team": "b", "run": "1"})
    running = made.running(labels={"team": "a"}).job_id

    def ids(**params: Any) -> set[str]:
        return {job["id"] for job in client.get("/v1/jobs", params=params).json()["items"]}

    assert ids() == {plain, a, b, running}
    assert ids(state="preparing") == {running}
    assert ids(state=["preparing", "queued"]) == {plain, a, b, running}
    assert ids(label="team:a") == ids(label="team=a") == {a, running}
    assert ids(label=["team:a", "run:1"]) == {a}
    assert ids(label="team:a", state="queued") == {a}
    assert ids(label="team:c") == set()


@pytest.mark.parametrize(
    "params",
    [
        {"limit": 0},
        {"limit": 201},
        {"limit": "x"},
        {"state": "sleeping"},
        {"label": "nocolon"},
        {"label": "a:\x00"},
        {"cursor": "job_x"},
        {"cursor": "\x00" * 40},
        {"cursor": "job_" + "\x00" * 36},
    ],
)
def test_bad_queries_are_refused(client: TestClient, params: dict[str, Any]) -> None:
    response = client.get("/v1/jobs", params=params)
    assert response.status_code == 422
    assert response.headers["Content-Type"] == "application/problem+json"


EVERY_READ = [
    "",
    "/events",
    "/logs",
    "/report",
    "/report.html",
    "/layers",
    "/attempts",
    "/files",
    "/files/model.safetensors",
    "/checkpoint",
]


@pytest.mark.parametrize("path", EVERY_READ)
def test_another_owners_job_does_not_exist(other: TestClient, made: Jobs, path: str) -> None:
    job_id = made.succeeded()
    missing = other.get(f"/v1/jobs/job_01a20085-9336-7d02-bb4b-8d97146bfb90{path}")
    theirs = other.get(f"/v1/jobs/{job_id}{path}")
    assert (theirs.status_code, theirs.json()["type"]) == (404, "/problems/job-not-found")
    assert missing.status_code == 404
    assert theirs.json()["title"] == missing.json()["title"]


@pytest.mark.parametrize("action", ["cancel", "retry"])
def test_another_owners_job_cannot_be_touched(
    client: TestClient, other: TestClient, made: Jobs, action: str
) -> None:
    job_id = made.queued()
    assert other.post(f"/v1/jobs/{job_id}/{action}").status_code == 404
    assert client.get(f"/v1/jobs/{job_id}").json()["state"] == "queued"


@pytest.mark.parametrize(
    "job_id", ["x", "job_", "job_" + "0" * 36, "job_01A20085-9336-7d02-bb4b-8d97146bfb90", "%00"]
)
def test_what_is_no_id_is_not_found(client: TestClient, job_id: str) -> None:
    assert client.get(f"/v1/jobs/{job_id}").status_code == 404


def test_polling_is_cheap_until_something_changes(
    client: TestClient, made: Jobs, sqlite_sessions: Any
) -> None:
    claim = made.running()
    first = client.get(f"/v1/jobs/{claim.job_id}")
    known = {"If-None-Match": first.headers["ETag"]}
    again = client.get(f"/v1/jobs/{claim.job_id}", headers=known)
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["ETag"] == first.headers["ETag"]
    with sqlite_sessions() as session:
        step = Step(State.QUANTIZING, "block 1 of 2", Progress(done=1, total=2, eta_s=3))
        leases.heartbeat(session, claim, step=step)
    fresh = client.get(f"/v1/jobs/{claim.job_id}", headers=known)
    assert fresh.status_code == 200
    assert fresh.json()["progress"] == {"done": 1, "total": 2, "eta_s": 3}
    assert fresh.headers["ETag"] != first.headers["ETag"]
    assert client.get(f"/v1/jobs/{claim.job_id}", headers={"If-None-Match": 'W/"x", *'}).status_code == 304


def test_a_long_poll_answers_when_the_job_changes(
    live: httpx2.Client, made: Jobs, sqlite_sessions: Any
) -> None:
    claim = made.running()
    etag = live.get(f"/v1/jobs/{claim.job_id}").headers["ETag"]
    changed = threading.Event()

    def change() -> None:
        time.sleep(0.5)
        changed.set()
        with sqlite_sessions() as session:
            leases.heartbeat(session, claim, step=Step(State.CALIBRATING, "s", Progress(done=1, total=2)))

    thread = threading.Thread(target=change)
    thread.start()
    answer = live.get(f"/v1/jobs/{claim.job_id}", headers={"If-None-Match": etag, "Prefer": "wait=15"})
    thread.join()
    assert changed.is_set()
    assert answer.status_code == 200
    assert answer.json()["state"] == "calibrating"
    assert answer.headers["Preference-Applied"] == "wait=15"


def test_a_long_poll_without_an_etag_waits_for_the_end(
    live: httpx2.Client, made: Jobs, sqlite_sessions: Any
) -> None:
    claim = made.running()

    def work() -> None:
        time.sleep(0.3)
        with sqlite_sessions() as session:
            leases.heartbeat(session, claim, step=Step(State.CALIBRATING, "s", Progress()))
        time.sleep(0.5)
        with sqlite_sessions() as session:
            error = JobError(type="x", title="t", detail="d")
            leases.finish(session, claim, Failed(error=error))

    thread = threading.Thread(target=work)
    thread.start()
    answer = live.get(f"/v1/jobs/{claim.job_id}", headers={"Prefer": "respond-async, wait=15"})
    thread.join()
    assert answer.json()["state"] == "failed"
    finished = live.get(f"/v1/jobs/{claim.job_id}", headers={"Prefer": "wait=15"})
    assert finished.json() == answer.json()  # at once: there is nothing to wait for


def test_an_unchanged_job_is_a_304_after_the_wait(live: httpx2.Client, made: Jobs) -> None:
    job_id = made.queued()
    etag = live.get(f"/v1/jobs/{job_id}").headers["ETag"]
    answer = live.get(f"/v1/jobs/{job_id}", headers={"If-None-Match": etag, "Prefer": "wait=1"})
    assert answer.status_code == 304
    assert answer.headers["Preference-Applied"] == "wait=1"


def test_many_long_polls_leave_room_for_others(
    live: httpx2.Client, server: str, made: Jobs, app: Any
) -> None:
    """More waiting clients than threads or database connections: a submit still gets through at once."""
    job_id = made.queued()
    headers = {**dict(live.headers), "Prefer": "wait=20"}
    watcher = app.state.services.watcher
    with (
        httpx2.Client(
            base_url=server, headers=headers, timeout=30, limits=httpx2.Limits(max_connections=200)
        ) as many,
        ThreadPoolExecutor(120) as pool,
    ):
        waiting = [pool.submit(many.get, f"/v1/jobs/{job_id}") for _ in range(120)]
        while len(watcher) < 120:
            time.sleep(0.02)
        assert live.post("/v1/jobs", json=REQUEST).status_code == 202
        assert len(watcher) == 120
        live.post(f"/v1/jobs/{job_id}/cancel")
        states = {answer.result().json()["state"] for answer in waiting}
    assert states == {"cancelled"}
    assert len(watcher) == 0


def test_cancel_and_retry(client: TestClient, made: Jobs) -> None:
    job_id = made.queued()
    assert client.post(f"/v1/jobs/{job_id}/cancel").json()["state"] == "cancelled"
    assert client.post(f"/v1/jobs/{job_id}/cancel").status_code == 202  # idempotent
    retried = client.post(f"/v1/jobs/{job_id}/retry")
    assert (retried.status_code, retried.json()["state"]) == (202, "queued")
    running = made.running().job_id
    assert client.post(f"/v1/jobs/{running}/cancel").json()["state"] == "cancelling"


def test_what_has_succeeded_is_neither_cancelled_nor_retried(client: TestClient, made: Jobs) -> None:
    job_id = made.succeeded()
    cancel, retry = client.post(f"/v1/jobs/{job_id}/cancel"), client.post(f"/v1/jobs/{job_id}/retry")
    assert (cancel.status_code, cancel.json()["type"]) == (409, "/problems/job-finished")
    assert (retry.status_code, retry.json()["type"]) == (409, "/problems/job-not-retryable")


def test_links_of_a_finished_job_lead_somewhere(client: TestClient, made: Jobs) -> None:
    links = client.get(f"/v1/jobs/{made.succeeded()}").json()["links"]
    assert {"self", "events", "attempts", "report", "layers", "files", "checkpoint"} <= set(links)
    assert {name: client.get(link).status_code for name, link in links.items()} == dict.fromkeys(links, 200)


def test_attempts_tell_who_ran_the_job(client: TestClient, made: Jobs) -> None:
    items = client.get(f"/v1/jobs/{made.succeeded()}/attempts").json()["items"]
    assert [(item["number"], item["worker"], item["outcome"]) for item in items] == [(1, "w1", "succeeded")]


def test_scopes_bound_what_a_key_may_do(app: Any, keys: Keys, made: Jobs) -> None:
    job_id = made.queued("carol")
    reader = TestClient(app, headers=keys.make("carol", "read"))
    writer = TestClient(app, headers=keys.make("carol", "write"))
    assert reader.get(f"/v1/jobs/{job_id}").status_code == 200
    for method, path in [("POST", "/v1/jobs"), ("POST", f"/v1/jobs/{job_id}/cancel"), ("GET", "/v1/keys")]:
        refused = reader.request(method, path, json=REQUEST if method == "POST" else None)
        assert (refused.status_code, refused.json()["type"]) == (403, "/problems/scope-missing")
    assert writer.post("/v1/jobs", json=REQUEST).status_code == 202
    assert writer.get("/v1/keys").status_code == 403


def test_a_label_can_be_any_word_the_contract_allows(client: TestClient) -> None:
    labels = {"a.b-c_d": "1.0-rc_2", "x": "y"}
    job = submit(client, labels=labels)
    found = client.get("/v1/jobs", params={"label": "a.b-c_d:1.0-rc_2"}).json()["items"]
    assert [item["id"] for item in found] == [job.id]
