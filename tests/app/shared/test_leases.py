"""What a claim is worth: leases, fencing, attempts, and the doorbells of the outbox."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from app.shared import jobs, lapses, leases
from app.shared.errors import ForbiddenMove
from app.shared.leases import Claim, Signal, Step
from app.shared.tables import Job, Outbox
from quantry.contract import Limits
from quantry.jobs import Cancelled, Failed, JobError, Progress, State
from quantry.requests import JobRequest

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OWNER = "owner"
LATE = NOW + timedelta(seconds=61)


def submit(session: Session, **limits: int) -> str:
    request = JobRequest(model="bundled/opt-tiny", bits=4, limits=Limits(**limits))
    return jobs.submit(session, request.resolve(), owner=OWNER, now=NOW)[0].id


def claimed(session: Session, job_id: str, worker: str = "w1", now: datetime = NOW) -> Claim:
    claim = leases.claim(session, job_id, worker=worker, now=now)
    assert claim is not None
    return claim


def quantizing(done: int = 0) -> Step:
    return Step(State.QUANTIZING, f"block {done}", Progress(done=done, total=3))


def failed() -> Failed:
    return Failed(error=JobError(type="t", title="t", detail="d"))


def test_a_second_doorbell_finds_nothing(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        job_id = submit(session)
        claimed(session, job_id)
        assert leases.claim(session, job_id, worker="w2", now=NOW) is None
        assert leases.claim(session, "job_none", worker="w2", now=NOW) is None


def test_many_workers_one_claim(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        job_id = submit(session)
    start, claims = threading.Barrier(8), []

    def try_to(worker: str) -> None:
        start.wait()
        with sessions() as session:
            claims.append(leases.claim(session, job_id, worker=worker, now=NOW))

    threads = [threading.Thread(target=try_to, args=(f"w{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claims) == 8
    assert sum(claim is not None for claim in claims) == 1


@pytest.mark.parametrize("successor", ["w1", "w2"])
def test_a_stale_epoch_writes_nothing(sessions: sessionmaker[Session], successor: str) -> None:
    """Also when the successor has the same name: a worker that was frozen, and its own restart."""
    with sessions() as session:
        job_id = submit(session)
        stale = claimed(session, job_id)
        fresh = claimed(session, job_id, successor, now=LATE)
        before = jobs.get(session, job_id, owner=OWNER).version

        assert leases.signal(session, stale) is Signal.LOST
        assert (
            leases.heartbeat(session, stale, step=quantizing(), events=[("log", {})], now=LATE) is Signal.LOST
        )
        assert leases.finish(session, stale, failed(), now=LATE) is None
        assert leases.release(session, stale, "stopped", now=LATE) is None
        assert jobs.get(session, job_id, owner=OWNER).version == before
        assert leases.finish(session, fresh, Cancelled(), now=LATE) is State.CANCELLED
        assert leases.finish(session, stale, failed(), now=LATE) is None


def test_heartbeats_renew_the_lease(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        job_id = submit(session)
        claim = claimed(session, job_id)
        leases.heartbeat(session, claim, now=NOW + timedelta(seconds=50))
        assert lapses.requeue_lapsed(session, now=NOW + timedelta(seconds=109)) == []
        assert lapses.requeue_lapsed(session, now=NOW + timedelta(seconds=110)) == [job_id]


def test_a_renewal_alone_changes_no_etag(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        job_id = submit(session)
        claim = claimed(session, job_id)
        leases.heartbeat(session, claim, step=quantizing(1), now=NOW)
        before = jobs.etag(jobs.get(session, job_id, owner=OWNER))
        leases.heartbeat(session, claim, step=quantizing(1), now=NOW + timedelta(seconds=10))
        assert jobs.etag(jobs.get(session, job_id, owner=OWNER)) == before
        leases.heartbeat(session, claim, step=quantizing(2), now=NOW + timedelta(seconds=20))
        assert jobs.etag(jobs.get(session, job_id, owner=OWNER)) != before


def test_three_lost_workers_end_the_job(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        job_id, now = submit(session), NOW
        for _ in range(3):
            claimed(session, job_id, now=now)
            now += timedelta(seconds=61)
            lapses.requeue_lapsed(session, now=now)
        job = jobs.to_read(jobs.get(session, job_id, owner=OWNER))
        assert job.state is State.FAILED
        assert job.error is not None
        assert (job.error.type, job.error.retryable) == ("worker-lost", True)
        assert [attempt.outcome for attempt in jobs.attempts(session, job_id, owner=OWNER)] == ["lost"] * 3

        jobs.retry(session, job_id, owner=OWNER, now=now)
        assert claimed(session, job_id, now=now).epoch == 4


def test_a_lapsed_lease_of_a_cancelling_job_ends_as_cancelled(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        job_id = submit(session)
        claimed(session, job_id)
        jobs.cancel(session, job_id, owner=OWNER, now=NOW)
        lapses.requeue_lapsed(session, now=LATE)
        assert jobs.get(session, job_id, owner=OWNER).state == State.CANCELLED


def test_giving_back_costs_no_attempt(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        job_id = submit(session)
        for _ in range(5):
            assert leases.release(session, claimed(session, job_id), "stopped", now=NOW) is State.QUEUED
        assert jobs.get(session, job_id, owner=OWNER).tries == 0


def test_a_worker_of_the_same_name_frees_its_job(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        mine, other = submit(session), submit(session)
        claimed(session, mine, "w1")
        claimed(session, other, "w2")
        assert lapses.forfeit(session, "w1", now=NOW) == 1
        assert lapses.requeue_lapsed(session, now=NOW) == [mine]


def test_a_job_that_waits_too_long_expires(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        job_id = submit(session, queue_s=10)
        assert lapses.expire_queued(session, now=NOW + timedelta(seconds=9)) == []
        later = NOW + timedelta(seconds=10)
        assert leases.claim(session, job_id, worker="w1", now=later) is None
        assert lapses.expire_queued(session, now=later) == [job_id]
        job = jobs.to_read(jobs.get(session, job_id, owner=OWNER))
        assert job.state is State.EXPIRED
        assert job.error is not None
        assert job.error.type == "queue-limit"


def test_going_back_a_stage_is_refused_and_changes_nothing(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        job_id = submit(session)
        claim = claimed(session, job_id)
        leases.heartbeat(session, claim, step=quantizing(), now=NOW)
        version = jobs.get(session, job_id, owner=OWNER).version
        back = Step(State.CALIBRATING, "again", Progress())
        with pytest.raises(ForbiddenMove, match="quantizing -> calibrating"):
            leases.heartbeat(session, claim, step=back, now=NOW)
        assert jobs.get(session, job_id, owner=OWNER).version == version


def test_the_outbox_holds_queued_jobs_and_no_others(sessions: sessionmaker[Session]) -> None:
    def waiting(session: Session) -> set[str]:
        found = set(session.scalars(select(Outbox.job_id)))
        session.rollback()
        return found

    with sessions() as session:
        job_id, other = submit(session), submit(session)
        assert waiting(session) == {job_id, other}
        claimed(session, job_id)
        jobs.cancel(session, other, owner=OWNER, now=NOW)
        assert waiting(session) == set()
        lapses.requeue_lapsed(session, now=LATE)
        assert waiting(session) == {job_id}


def test_claims_name_the_blobs_of_uploads(sessions: sessionmaker[Session]) -> None:
    from app.shared.tables import Dataset

    with sessions() as session:
        row = Dataset(id="ds_1", owner=OWNER, name="a.txt", suffix=".txt", bytes=3, sha256="0" * 64)
        row.documents, row.characters, row.created_at = 1, 3, NOW
        with session.begin():
            session.add(row)
        calibration = {"dataset": {"source": "upload", "id": "ds_1"}}
        request = JobRequest.model_validate(
            {"model": "bundled/opt-tiny", "bits": 4, "calibration": calibration, "evaluation": None}
        )
        mine = jobs.submit(session, request.resolve(), owner=OWNER, now=NOW)[0].id
        foreign = jobs.submit(session, request.resolve(), owner="other", now=NOW)[0].id
        assert claimed(session, mine).uploads == {"ds_1": ("0" * 64, ".txt")}
        assert claimed(session, foreign).uploads == {}


def test_every_state_has_its_rows(sessions: sessionmaker[Session]) -> None:
    """The check constraint of the table knows the states of the contract."""
    with sessions() as session:
        job_id = submit(session)
        for state in State:
            with session.begin():
                row = session.get(Job, job_id)
                assert row is not None
                row.state = state.value
