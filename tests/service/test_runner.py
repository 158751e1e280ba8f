"""The runner with real job processes that behave well, badly and worse."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy.orm import Session, sessionmaker

from app.shared import jobs, lapses, leases
from app.shared.settings import Settings
from app.shared.storage import Storage
from quantry.contract import Limits
from quantry.jobs import Event, JobRead, State
from quantry.requests import JobRequest
from tests.service.processes import await_gone, gone
from worker.runner import Runner
from worker.tasks import run_job

OWNER = "tester"


@pytest.fixture
def runner(tmp_path: Path, sqlite_sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    settings = Settings(
        data=tmp_path,
        job_module="child_jobs",
        warm=False,
        lease_s=4,
        heartbeat_s=0.5,
        poll_s=0.05,
        device="cpu",
    )
    Storage(settings.storage).prepare()
    return Runner(settings, sqlite_sessions, "cpu")


def submit(runner: Runner, behave: str, **options: object) -> str:
    request = {"model": "bundled/opt-tiny", "bits": 4, "labels": {"behave": behave}, **options}
    with runner.sessions() as session:
        return jobs.submit(session, JobRequest.model_validate(request).resolve(), owner=OWNER)[0].id


def read(runner: Runner, job_id: str) -> JobRead:
    with runner.sessions() as session:
        return jobs.to_read(jobs.get(session, job_id, owner=OWNER))


def events(runner: Runner, job_id: str) -> list[Event]:
    with runner.sessions() as session:
        return jobs.events(session, job_id, owner=OWNER)


def run(runner: Runner, behave: str, **options: object) -> JobRead:
    job_id = submit(runner, behave, **options)
    run_job(runner, "w1", job_id)
    return read(runner, job_id)


def in_background(runner: Runner, job_id: str) -> threading.Thread:
    thread = threading.Thread(target=run_job, args=(runner, "w1", job_id))
    thread.start()
    return thread


def await_state(runner: Runner, job_id: str, state: State) -> None:
    deadline = time.monotonic() + 30
    while read(runner, job_id).state != state:
        assert time.monotonic() < deadline, read(runner, job_id)
        time.sleep(0.05)


def folders(runner: Runner, job_id: str) -> set[str]:
    return {path.name for path in runner.storage.job(job_id).iterdir()}


def pids_of(runner: Runner, job_id: str) -> list[int]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for event in events(runner, job_id):
            if "pids" in event.data:
                return list(event.data["pids"])
        time.sleep(0.05)
    raise AssertionError("the job never told its processes")


def test_success_publishes_files_and_quality(runner: Runner) -> None:
    job = run(runner, "succeed")

    assert job.state == State.SUCCEEDED
    assert job.quality is not None
    assert job.quality[0].quantized == 3.0
    assert job.quality[0].rtn is None  # an infinity has no JSON
    assert folders(runner, job.id) == {"attempt-1", "attempt-1.log"}
    published = runner.storage.artifact(f"jobs/{job.id}/attempt-1") / "model.safetensors"
    assert published.read_text() == f"{job.id} attempt 1"


def test_the_job_that_waits_longest_runs_first(runner: Runner) -> None:
    """A job that is queued again is announced behind those that came later."""
    first, second = submit(runner, "succeed"), submit(runner, "succeed")
    run_job(runner, "w1", second)
    assert [read(runner, job).state for job in (first, second)] == [State.SUCCEEDED, State.QUEUED]
    run_job(runner, "w1", first)
    assert read(runner, second).state == State.SUCCEEDED
    assert run_job(runner, "w1", second) is None


def test_events_tell_the_story_in_order(runner: Runner) -> None:
    job = run(runner, "succeed")
    told = events(runner, job.id)

    assert [event.id for event in told] == list(range(1, len(told) + 1))
    states = [event.data["state"] for event in told if event.kind == "state"]
    assert states == ["queued", "preparing", "quantizing", "packaging", "succeeded"]
    assert [event.data for event in told if event.kind == "block"] == [{"index": 0, "relative_mse": None}]
    assert told[-1].kind == "result"


def test_a_missed_gate_keeps_the_files(runner: Runner) -> None:
    job = run(runner, "reject")

    assert job.state == State.REJECTED
    assert job.error is not None
    assert job.error.type == "quality-gate"
    assert "attempt-1" in folders(runner, job.id)


@pytest.mark.parametrize(
    ("behave", "type", "said"),
    [
        ("killed", "process-killed", "SIGKILL"),
        ("crash", "process-crashed", "SIGSEGV"),
        ("abort", "out-of-memory", "memory allocation of 20 bytes failed"),
        ("leave", "process-crashed", "status 3"),
        ("garbage", "internal-error", "not a message"),
        ("backwards", "internal-error", "packaging -> quantizing"),
        ("eat_memory", "out-of-memory", "memory ran out"),
        ("fill_disk", "disk-full", "No space left"),
        ("not_finite", "non-finite", "mlp.down_proj"),
        ("bug", "internal-error", "KeyError"),
        ("missing_file", "export-failed", "model.safetensors is missing"),
    ],
)
def test_failures_are_typed_and_leave_nothing(runner: Runner, behave: str, type: str, said: str) -> None:
    job = run(runner, behave)

    assert job.state == State.FAILED
    assert job.error is not None
    assert job.error.type == type
    assert said in job.error.detail
    assert "/home/somebody" not in job.error.detail
    assert folders(runner, job.id) == {"attempt-1.log", "checkpoints"}


def test_what_a_failed_process_printed_is_an_event(runner: Runner) -> None:
    job = run(runner, "leave")
    tails = [event.data["tail"] for event in events(runner, job.id) if event.kind == "log"]
    assert tails == ["the last line before the end\n"]


def test_much_talk_neither_blocks_nor_floods(runner: Runner) -> None:
    job = run(runner, "chatter")
    told = events(runner, job.id)

    assert job.state == State.SUCCEEDED
    assert sum(event.kind == "warning" for event in told) == 50
    assert sum(event.kind == "progress" for event in told) < 100


def test_cancel_ends_the_whole_group(runner: Runner) -> None:
    job_id = submit(runner, "fork")
    thread = in_background(runner, job_id)
    pids = pids_of(runner, job_id)
    with runner.sessions() as session:
        assert jobs.cancel(session, job_id, owner=OWNER).state == State.CANCELLING
    thread.join(timeout=10)

    assert read(runner, job_id).state == State.CANCELLED
    await_gone(pids)
    assert folders(runner, job_id) == {"attempt-1.log", "checkpoints"}


def test_a_process_left_behind_is_ended(runner: Runner) -> None:
    job = run(runner, "orphan")
    assert job.state == State.SUCCEEDED
    await_gone(pids_of(runner, job.id))


def test_stopping_the_worker_gives_the_job_back(runner: Runner) -> None:
    job_id = submit(runner, "fork")
    thread = in_background(runner, job_id)
    pids = pids_of(runner, job_id)
    runner.stop()
    thread.join(timeout=10)

    job = read(runner, job_id)
    assert job.state == State.QUEUED
    assert "checkpoints" in folders(runner, job_id)
    await_gone(pids)
    with runner.sessions() as session:
        assert [attempt.outcome for attempt in jobs.attempts(session, job_id, owner=OWNER)] == ["lost"]
        assert jobs.get(session, job_id, owner=OWNER).tries == 0


def test_a_fenced_worker_ends_its_copy(runner: Runner) -> None:
    job_id = submit(runner, "fork")
    thread = in_background(runner, job_id)
    pids = pids_of(runner, job_id)
    with runner.sessions() as session:  # as if the worker had been frozen past its lease
        lapses.forfeit(session, "w1")
        other = leases.claim(session, job_id, worker="w2")
    assert other is not None
    thread.join(timeout=10)

    await_gone(pids)
    assert read(runner, job_id).attempt == 2
    with runner.sessions() as session:
        assert leases.signal(session, other) is leases.Signal.CONTINUE


@pytest.mark.parametrize(
    ("limits", "type"),
    [
        (Limits(run_s=1), "run-limit"),
        (Limits(no_progress_s=1), "no-progress"),
    ],
)
def test_limits_end_the_job(runner: Runner, limits: Limits, type: str) -> None:
    job = run(runner, "hang", limits=limits.model_dump())
    assert job.error is not None
    assert job.error.type == type


def test_a_job_for_a_gpu_is_refused_without_one(runner: Runner) -> None:
    job = run(runner, "succeed", device="cuda")
    assert job.error is not None
    assert job.error.type == "device-unavailable"


def test_a_warm_process_is_used_once(runner: Runner) -> None:
    warm = Runner(runner.settings.model_copy(update={"warm": True}), runner.sessions, "cpu")
    try:
        warm.warm_up()
        assert warm._warm is not None
        first = warm._warm.pid
        assert run(warm, "succeed").state == State.SUCCEEDED
        assert warm._warm is not None
        assert warm._warm.pid != first
        assert gone(first)
        os.kill(warm._warm.pid, 9)  # one that died while it waited is replaced
        await_gone([warm._warm.pid])
        assert run(warm, "succeed").state == State.SUCCEEDED
    finally:
        waiting = warm._warm
        warm.stop()
    assert waiting is not None
    await_gone([waiting.pid])


def test_a_job_process_sees_no_secret(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from worker.child import environment

    monkeypatch.setenv("QUANTRY_DATABASE_URL", "postgresql://user:password@host/db")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("HF_TOKEN", "t")
    monkeypatch.setenv("HARMLESS", "yes")
    seen = environment(threads=3)

    assert not [
        name for name in seen if name.startswith("QUANTRY_") or name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN")
    ]
    assert seen["HARMLESS"] == "yes"
    assert seen["OMP_NUM_THREADS"] == "3"
