"""What an owner does with jobs: submit, list, read, cancel, retry."""

from __future__ import annotations

import threading
from datetime import UTC, datetime

import pytest
from sqlalchemy.orm import Session, sessionmaker

from app.shared import jobs, leases
from app.shared.database import transaction
from app.shared.errors import (
    BadCursor,
    IdempotencyConflict,
    JobFinished,
    JobNotFound,
    JobNotRetryable,
    QueueFull,
)
from quantry.contract import JobSpec
from quantry.jobs import Failed, JobError, State
from quantry.requests import JobRequest

OWNER = "owner"


def spec(bits: int = 4, labels: dict[str, str] | None = None) -> JobSpec:
    request = {"model": "bundled/opt-tiny", "bits": bits, "labels": labels or {}}
    return JobRequest.model_validate(request).resolve()


def test_a_submitted_job_reads_back_whole(sessions: sessionmaker[Session]) -> None:
    asked = spec(labels={"team": "a-b.c"})
    with sessions() as session:
        job = jobs.to_read(jobs.submit(session, asked, owner=OWNER)[0])
        again = jobs.to_read(jobs.get(session, job.id, owner=OWNER))

    assert job == again
    assert job.spec == asked
    assert job.state is State.QUEUED
    assert job.labels == {"team": "a-b.c"}
    assert job.created_at.tzinfo is not None
    assert set(job.links) == {"self", "events", "logs", "attempts", "cancel"}


def test_ids_sort_by_time(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        ids = [jobs.submit(session, spec(), owner=OWNER)[0].id for _ in range(20)]
    assert ids == sorted(ids)


def test_the_same_key_makes_one_job(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        first, new = jobs.submit(session, spec(), owner=OWNER, idempotency_key="k")
        assert new
        again, new = jobs.submit(session, spec(), owner=OWNER, idempotency_key="k")
        assert (again.id, new) == (first.id, False)
        with pytest.raises(IdempotencyConflict, match=first.id):
            jobs.submit(session, spec(bits=3), owner=OWNER, idempotency_key="k")
        assert jobs.submit(session, spec(bits=3), owner="other", idempotency_key="k")[0].id != first.id
        assert len(jobs.page(session, owner=OWNER)[0]) == 1


def test_a_key_used_at_once_by_many_makes_one_job(sessions: sessionmaker[Session]) -> None:
    start, ids = threading.Barrier(8), []

    def send() -> None:
        start.wait()
        with sessions() as session:
            ids.append(jobs.submit(session, spec(), owner=OWNER, idempotency_key="k")[0].id)

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    assert len(set(ids)) == 1


def test_a_full_queue_refuses(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        first = jobs.submit(session, spec(), owner=OWNER, max_unfinished=2)[0]
        jobs.submit(session, spec(), owner=OWNER, max_unfinished=2)
        jobs.submit(session, spec(), owner="other", max_unfinished=2)
        with pytest.raises(QueueFull, match="limit is 2"):
            jobs.submit(session, spec(), owner=OWNER, max_unfinished=2)
        jobs.cancel(session, first.id, owner=OWNER)
        jobs.submit(session, spec(), owner=OWNER, max_unfinished=2)


def test_pages_are_stable_while_jobs_arrive(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        ids = [jobs.submit(session, spec(), owner=OWNER)[0].id for _ in range(7)]
        seen, cursor = [], None
        for _ in range(4):
            found, cursor = jobs.page(session, owner=OWNER, limit=3, cursor=cursor)
            seen += [job.id for job in found]
            jobs.submit(session, spec(), owner=OWNER)[0]  # newer than every page to come
            if cursor is None:
                break
    assert seen == ids[::-1]
    assert cursor is None


def test_pages_filter_by_state_and_label(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        one = jobs.submit(session, spec(labels={"team": "x"}), owner=OWNER)[0].id
        jobs.submit(session, spec(labels={"team": "y"}), owner=OWNER)
        dotted = jobs.submit(session, spec(labels={"a.b-c": "1.0"}), owner=OWNER)[0].id
        jobs.cancel(session, one, owner=OWNER)

        def ids(**filters: object) -> set[str]:
            return {job.id for job in jobs.page(session, owner=OWNER, **filters)[0]}  # type: ignore[arg-type]

        assert ids(states=[State.CANCELLED]) == {one}
        assert ids(label=("team", "x")) == {one}
        assert ids(label=("a.b-c", "1.0")) == {dotted}
        assert ids(states=[State.QUEUED], label=("team", "x")) == set()


@pytest.mark.parametrize("cursor", ["", "x", "job_", "job_" + "0" * 40, "1; DROP TABLE jobs"])
def test_a_foreign_cursor_is_refused(sqlite_sessions: sessionmaker[Session], cursor: str) -> None:
    with sqlite_sessions() as session, pytest.raises(BadCursor):
        jobs.page(session, owner=OWNER, cursor=cursor)


def test_another_owner_finds_nothing(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        job_id = jobs.submit(session, spec(), owner=OWNER)[0].id
        for act in (jobs.get, jobs.cancel, jobs.retry, jobs.events, jobs.attempts):
            with pytest.raises(JobNotFound):
                act(session, job_id, owner="other")
        assert jobs.page(session, owner="other") == ([], None)
        assert jobs.get(session, job_id, owner=OWNER).state == State.QUEUED


def test_cancel_is_idempotent_and_retry_undoes_it(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        job_id = jobs.submit(session, spec(), owner=OWNER)[0].id
        for _ in range(2):
            assert jobs.cancel(session, job_id, owner=OWNER).state == State.CANCELLED
        for _ in range(2):
            assert jobs.retry(session, job_id, owner=OWNER).state == State.QUEUED
        assert leases.claim(session, job_id, worker="w") is not None
        for _ in range(2):
            assert jobs.cancel(session, job_id, owner=OWNER).state == State.CANCELLING
        with pytest.raises(JobNotRetryable, match="being cancelled"):
            jobs.retry(session, job_id, owner=OWNER)


def test_a_finished_job_is_not_cancelled(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        job_id = jobs.submit(session, spec(), owner=OWNER)[0].id
        claim = leases.claim(session, job_id, worker="w")
        assert claim is not None
        leases.finish(session, claim, Failed(error=JobError(type="t", title="t", detail="d")))
        with pytest.raises(JobFinished, match="failed"):
            jobs.cancel(session, job_id, owner=OWNER)


def test_events_replay_from_any_number(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        job_id = jobs.submit(session, spec(), owner=OWNER)[0].id
        jobs.cancel(session, job_id, owner=OWNER)
        jobs.retry(session, job_id, owner=OWNER)
        assert [event.id for event in jobs.events(session, job_id, owner=OWNER)] == [1, 2, 3]
        assert [event.data["state"] for event in jobs.events(session, job_id, owner=OWNER, after=1)] == [
            "cancelled",
            "queued",
        ]
        assert len(jobs.events(session, job_id, owner=OWNER, limit=2)) == 2


def test_functions_refuse_to_join_a_transaction(sqlite_sessions: sessionmaker[Session]) -> None:
    with sqlite_sessions() as session, session.begin():
        session.connection()
        with pytest.raises(RuntimeError, match="already open"):
            jobs.page(session, owner=OWNER)


def test_readers_do_not_wait_for_a_writer(sqlite_sessions: sessionmaker[Session]) -> None:
    with sqlite_sessions() as session:
        job_id = jobs.submit(session, spec(), owner=OWNER)[0].id
    with sqlite_sessions() as writer, transaction(writer), sqlite_sessions() as reader:
        assert jobs.get(reader, job_id, owner=OWNER).id == job_id


def test_times_are_utc_on_both_databases(sessions: sessionmaker[Session]) -> None:
    moment = datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC)
    with sessions() as session:
        job = jobs.submit(session, spec(), owner=OWNER, now=moment)[0]
        assert jobs.get(session, job.id, owner=OWNER).created_at == moment
