"""The life of jobs as a state machine: any order of requests, workers, stale claims and passing time.

Several jobs and workers; time is a number that the machine moves, so leases lapse when it says so. The same
rules run on SQLite and on PostgreSQL.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session, sessionmaker

from app.shared import jobs, lapses, leases
from app.shared.database import make_sessions
from app.shared.errors import ForbiddenMove, IdempotencyConflict, JobFinished, JobNotRetryable
from app.shared.leases import Claim, Signal, Step
from app.shared.tables import Base, Job, JobAttempt, JobEvent, Outbox
from quantry.contract import JobSpec, Limits
from quantry.jobs import (
    FINISHED,
    MOVES,
    RUNNING,
    Cancelled,
    Failed,
    JobError,
    Outcome,
    Progress,
    Rejected,
    State,
    Succeeded,
)
from quantry.reports import CostReport, Loader, Manifest, Report, SizeReport
from quantry.requests import JobRequest

OWNER = "owner"
LEASE = timedelta(seconds=60)
MAX_ATTEMPTS = 3
QUEUE_S = 500
WORKERS = ("w1", "w2")
KEYS = (None, "key-a", "key-b")
HELD = (*RUNNING, State.CANCELLING)


def spec(bits: int) -> JobSpec:
    request = JobRequest(model="bundled/opt-tiny", bits=bits, limits=Limits(queue_s=QUEUE_S))  # type: ignore[arg-type]
    return request.resolve()


def outcomes() -> dict[str, Outcome]:
    size = SizeReport(fp_bytes=1, quantized_bytes=1, effective_bits=4, quantized_weights=1)
    cost = CostReport(wall_s=1, cpu_s=1, peak_rss_bytes=1)
    report = Report(
        quality=(),
        size=size,
        layers=(),
        blocks=(),
        cost=cost,
        environment={},
        fingerprint="",
        format="quantry",
    )
    loader = Loader(package="p", version="1", snippet="")
    manifest = Manifest(job=None, format="quantry", loader=loader, files=())
    return {
        "succeeded": Succeeded(report=report, manifest=manifest),
        "rejected": Rejected(report=report, manifest=manifest, detail="missed"),
        "failed": Failed(error=JobError(type="t", title="t", detail="d")),
        "cancelled": Cancelled(),
    }


OUTCOMES = outcomes()


class Life(RuleBasedStateMachine):
    """`self.seen` is what the rows said after the last step: each step may only make moves of the table."""

    sessions: sessionmaker[Session]

    def __init__(self) -> None:
        super().__init__()
        with self.sessions() as session, session.begin():
            for table in reversed(Base.metadata.sorted_tables):
                session.execute(table.delete())
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.submitted: set[str] = set()
        self.keys: dict[str, tuple[str, int]] = {}
        self.seen: dict[str, tuple[str, int]] = {}

    ids = Bundle("ids")
    claims = Bundle("claims")

    def session(self) -> Session:
        return self.sessions()

    def row(self, job_id: str) -> Job:
        with self.session() as session:
            return jobs.get(session, job_id, owner=OWNER)

    # what an owner does

    @initialize(target=ids)
    def first(self) -> str:
        return self.submit(key=None, bits=4)

    @precondition(lambda self: len(self.submitted) < 3)  # few jobs meet more workers each
    @rule(target=ids, key=st.sampled_from(KEYS), bits=st.sampled_from((3, 4)))
    def submit(self, key: str | None, bits: int) -> str:
        known = self.keys.get(key) if key is not None else None
        with self.session() as session:
            if known is not None and known[1] != bits:
                with pytest.raises(IdempotencyConflict):
                    jobs.submit(session, spec(bits), owner=OWNER, idempotency_key=key, now=self.now)
                return known[0]
            job = jobs.submit(session, spec(bits), owner=OWNER, idempotency_key=key, now=self.now)[0]
        if known is not None:
            assert job.id == known[0]
        else:
            assert job.id not in self.submitted
            assert job.state == State.QUEUED
        self.submitted.add(job.id)
        if key is not None:
            self.keys[key] = (job.id, bits)
        return job.id

    @rule(job_id=ids)
    def cancel(self, job_id: str) -> None:
        before = State(self.row(job_id).state)
        with self.session() as session:
            if before in FINISHED and before is not State.CANCELLED:
                with pytest.raises(JobFinished):
                    jobs.cancel(session, job_id, owner=OWNER, now=self.now)
                return
            after = State(jobs.cancel(session, job_id, owner=OWNER, now=self.now).state)
        expected = State.CANCELLED if before in (State.QUEUED, State.CANCELLED) else State.CANCELLING
        assert after is expected

    @rule(job_id=ids)
    def retry(self, job_id: str) -> None:
        before = State(self.row(job_id).state)
        with self.session() as session:
            if before in (State.SUCCEEDED, State.CANCELLING):
                with pytest.raises(JobNotRetryable):
                    jobs.retry(session, job_id, owner=OWNER, now=self.now)
                return
            job = jobs.retry(session, job_id, owner=OWNER, now=self.now)
        if before in FINISHED:
            assert (job.state, job.tries, job.error, job.artifact) == (State.QUEUED, 0, None, None)
        else:
            assert job.state == before

    # what workers do, whether their claims still hold or not

    @rule(target=claims, job_id=ids, worker=st.sampled_from(WORKERS))
    def claim(self, job_id: str, worker: str) -> Claim | MultipleResults[Claim]:
        before = self.row(job_id)
        with self.session() as session:
            claim = leases.claim(
                session, job_id, worker=worker, lease=LEASE, max_attempts=MAX_ATTEMPTS, now=self.now
            )
        lapsed = before.state in RUNNING and before.lease_until <= self.now and before.tries < MAX_ATTEMPTS
        free = before.state == State.QUEUED or lapsed
        assert (claim is not None) == (free and before.expires_at > self.now)
        if claim is not None:
            assert claim.epoch == before.epoch + 1
        return claim if claim is not None else multiple()

    def holds(self, claim: Claim) -> bool:
        row = self.row(claim.job_id)
        return row.epoch == claim.epoch and row.worker == claim.worker and row.state in HELD

    @rule(claim=claims, state=st.sampled_from(RUNNING), done=st.integers(0, 3))
    def heartbeat(self, claim: Claim, state: State, done: int) -> None:
        before, valid = self.row(claim.job_id), self.holds(claim)
        with self.session() as session:
            assert (leases.signal(session, claim) is Signal.LOST) == (not valid)
        step = Step(state, f"step {done}", Progress(done=done, total=3))
        at = State(before.state)
        with self.session() as session:
            if valid and at in RUNNING and state is not at and state not in MOVES[at]:
                with pytest.raises(ForbiddenMove):
                    leases.heartbeat(session, claim, step=step, lease=LEASE, now=self.now)
                return
            signal = leases.heartbeat(
                session, claim, step=step, events=[("log", {})], lease=LEASE, now=self.now
            )
        after = self.row(claim.job_id)
        if not valid:
            assert signal is Signal.LOST
            self.unchanged(before, after)
        elif at is State.CANCELLING:
            assert signal is Signal.CANCEL
            assert after.state == State.CANCELLING
        else:
            assert signal is Signal.CONTINUE
            assert (after.state, after.done) == (state, done)
            assert after.lease_until == self.now + LEASE

    @rule(claim=claims, kind=st.sampled_from(sorted(OUTCOMES)))
    def finish(self, claim: Claim, kind: str) -> None:
        before, valid = self.row(claim.job_id), self.holds(claim)
        artifact = f"jobs/{claim.job_id}/attempt-{claim.epoch}" if kind in ("succeeded", "rejected") else None
        with self.session() as session:
            state = leases.finish(session, claim, OUTCOMES[kind], artifact=artifact, now=self.now)
            again = leases.finish(session, claim, OUTCOMES["failed"], now=self.now)
        after = self.row(claim.job_id)
        if not valid:
            self.unchanged(before, after)
            assert state == (
                before.state if before.state in FINISHED and before.epoch == claim.epoch else None
            )
        else:
            assert state == after.state == (State.CANCELLED if before.state == State.CANCELLING else kind)
            assert after.artifact == (artifact if after.state == kind else None)
        assert again == state

    @rule(claim=claims)
    def release(self, claim: Claim) -> None:
        before, valid = self.row(claim.job_id), self.holds(claim)
        with self.session() as session:
            state = leases.release(session, claim, "stopped", now=self.now)
        after = self.row(claim.job_id)
        if not valid:
            assert state is None
            self.unchanged(before, after)
        else:
            assert after.state == (State.CANCELLED if before.state == State.CANCELLING else State.QUEUED)

    @rule(worker=st.sampled_from(WORKERS))
    def a_worker_of_the_same_name_starts(self, worker: str) -> None:
        with self.session() as session:
            lapses.forfeit(session, worker, now=self.now)

    # what passes by itself

    @rule(seconds=st.sampled_from((1, 30, 61, 600)))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @rule(seconds=st.sampled_from((0, 61)))
    def dispatch(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)
        with self.session() as session:
            queued = lapses.requeue_lapsed(session, max_attempts=MAX_ATTEMPTS, now=self.now)
            expired = lapses.expire_queued(session, now=self.now)
        for row in self.rows():
            if row.state in HELD:
                assert row.lease_until > self.now
            if row.state == State.QUEUED:
                assert row.expires_at > self.now
            if row.id in expired:
                assert row.state == State.EXPIRED
            elif row.id in queued:
                assert row.state == State.QUEUED

    # what always holds

    def rows(self) -> list[Job]:
        with self.session() as session:
            return list(session.scalars(select(Job)))

    @staticmethod
    def unchanged(before: Job, after: Job) -> None:
        for column in Job.__table__.columns:
            assert getattr(before, column.name) == getattr(after, column.name), column.name

    @invariant()
    def nothing_is_lost(self) -> None:
        with self.session() as session:
            doorbells = set(session.scalars(select(Outbox.job_id)))
        rows = self.rows()
        assert {row.id for row in rows} == self.submitted
        assert doorbells == {row.id for row in rows if row.state == State.QUEUED}

    @invariant()
    def rows_are_consistent(self) -> None:
        for row in self.rows():
            assert (row.state in HELD) == (row.lease_until is not None) == (row.worker is not None)
            assert (row.state in FINISHED) == (row.finished_at is not None)
            assert 0 <= row.tries <= MAX_ATTEMPTS
            assert row.tries <= row.epoch
            if row.state in (State.FAILED, State.REJECTED, State.EXPIRED):
                assert row.error is not None
            assert (row.artifact is not None) == (row.state in (State.SUCCEEDED, State.REJECTED))
            assert jobs.to_read(row).state == row.state

    @invariant()
    def every_move_is_of_the_table(self) -> None:
        """Also those that followed one another within a step: each left an event."""
        with self.session() as session:
            for row in self.rows():
                events = list(
                    session.scalars(select(JobEvent).where(JobEvent.job_id == row.id).order_by(JobEvent.id))
                )
                assert [event.id for event in events] == list(range(1, row.last_event + 1))
                states = [State(event.data["state"]) for event in events if event.kind == "state"]
                assert states[0] is State.QUEUED
                assert states[-1] == row.state
                for one, next_one in pairwise(states):
                    assert next_one in MOVES[one], (one, next_one)

    @invariant()
    def one_attempt_runs_at_most(self) -> None:
        with self.session() as session:
            for row in self.rows():
                attempts = list(
                    session.scalars(
                        select(JobAttempt).where(JobAttempt.job_id == row.id).order_by(JobAttempt.number)
                    )
                )
                assert [attempt.number for attempt in attempts] == list(range(1, row.epoch + 1))
                open_ones = [attempt.number for attempt in attempts if attempt.finished_at is None]
                assert open_ones == ([row.epoch] if row.state in HELD else [])

    @invariant()
    def a_visible_change_changes_the_version(self) -> None:
        for row in self.rows():
            shown = jobs.to_read(row).model_dump_json()
            known = self.seen.get(row.id)
            if known is not None:
                assert (known[0] == shown) or (known[1] < row.version)
            self.seen[row.id] = (shown, row.version)


EXAMPLES = int(os.environ.get("QUANTRY_TEST_EXAMPLES", "25"))  # thousands, now and then


def test_the_life_of_jobs(engine: Engine) -> None:
    machine = type("LifeOnThisDatabase", (Life,), {"sessions": make_sessions(engine)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
