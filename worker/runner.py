"""Run one job: a process group of its own, watched until it ends or has to be ended."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from app.shared import leases
from app.shared.errors import ForbiddenMove
from app.shared.leases import Claim, Signal, Step
from app.shared.settings import Settings
from app.shared.storage import Storage
from quantry.jobs import Cancelled, Failed, Outcome, Progress, Rejected, State, Succeeded
from quantry.reports import Manifest
from worker import child as children
from worker import ending
from worker.child import BadMessage, Child
from worker.errors import DeviceError, DiskFull, ExportError, OutOfMemory
from worker.pulse import Pulse
from worker.workspace import JobInput, Workspace

log = logging.getLogger(__name__)

_OUTCOME: TypeAdapter[Outcome] = TypeAdapter(Outcome)
_RECORD_FOR_S = 600  # how long the result of a job waits for a database that is away


class Left(Enum):
    """The job goes on without us."""

    LOST = "lost"  # another worker has it
    STOPPED = "stopped"  # this worker was told to stop


@dataclass
class Runner:
    """Runs jobs one after another; between them one process waits, imported and ready, for the next."""

    settings: Settings
    sessions: sessionmaker[Session]
    device: Literal["cpu", "cuda"]
    stopping: threading.Event = field(default_factory=threading.Event)
    _warm: Child | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def storage(self) -> Storage:
        return Storage(self.settings.storage)

    def run(self, claim: Claim) -> State | None:
        """Run the job that was claimed and record its end; None if it left us unfinished."""
        pulse = Pulse(self.sessions, self.settings, claim)
        try:
            request = self._request(claim)
        except DeviceError as error:
            return self._record(pulse, Failed(error=error.as_job_error()))
        except OSError as error:
            full = DiskFull(f"the storage of worker {claim.worker} cannot be written: {error}")
            return self._record(pulse, Failed(error=full.as_job_error()))
        try:
            child = self._take(self.storage.log(claim.job_id, claim.epoch))
        except OSError as error:
            failed = OutOfMemory(
                f"worker {claim.worker} could not start a process: {error.strerror or error}"
            )
            return self._record(pulse, Failed(error=failed.as_job_error()))
        try:
            result = self._follow(child, request, pulse)
        finally:
            child.end()
        self.warm_up()
        if result is Left.LOST:
            log.warning("%s: attempt %d was overtaken and ended", claim.job_id, claim.epoch)
            self.storage.discard(claim.job_id, claim.epoch)
            return None
        if isinstance(result, Failed):
            pulse.event("log", {"tail": ending.tail(child.log)})
        with contextlib.suppress(ForbiddenMove):  # it was reported when it happened
            pulse.flush()
        return self._release(claim) if result is Left.STOPPED else self._record(pulse, result)

    def warm_up(self) -> None:
        """Start the next job's process ahead of time."""
        with self._lock:
            if self.settings.warm and not self.stopping.is_set() and self._warm is None:
                try:
                    self._warm = self._start(
                        self.storage.root / "run" / f"next-{socket.gethostname()}-{os.getpid()}.log"
                    )
                except OSError:  # the present job must not suffer; the next one starts its own
                    log.exception("the next job's process could not be started ahead of time")

    def stop(self) -> None:
        """End the present job, giving it back, and start no other."""
        self.stopping.set()
        with self._lock:
            if self._warm is not None:
                self._warm.end()
                self._warm.log.unlink(missing_ok=True)
                self._warm = None

    def _start(self, path: Path) -> Child:
        return children.start(self.settings.job_module, path, threads=self.settings.threads)

    def _take(self, path: Path) -> Child:
        """The waiting process, or a new one if none waits; its log moves to `path`."""
        with self._lock:
            child, self._warm = self._warm, None
        if child is not None:
            if not child.exited():
                child.log = child.log.rename(path)
                return child
            child.end()
            child.log.unlink(missing_ok=True)
        return self._start(path)

    def _request(self, claim: Claim) -> bytes:
        """The line that tells the process what to do. Raises DeviceError, OSError."""
        wanted = claim.spec.device
        if wanted == "cuda" and self.device != "cuda":
            raise DeviceError(f"the job asks for cuda, and worker {claim.worker} computes on {self.device}")
        workspace = Workspace(
            artifact=self.storage.open_part(claim.job_id, claim.epoch),
            checkpoints=self.storage.checkpoints(claim.job_id),
            cache=self.settings.cache,
            model_roots=self.settings.model_roots,
            uploads={name: self.storage.blob(*blob) for name, blob in claim.uploads.items()},
            start=self.storage.artifact(claim.start) if claim.start else None,
            hub_url=self.settings.hub_url,
            offline=self.settings.offline,
            device=self.device if wanted == "auto" else wanted,
            threads=self.settings.threads,
            inception_weights=self.settings.inception_weights,
        )
        workspace.cache.mkdir(parents=True, exist_ok=True)
        job = JobInput(job=claim.job_id, attempt=claim.epoch, spec=claim.spec, workspace=workspace)
        return job.model_dump_json().encode()

    def _follow(self, child: Child, request: bytes, pulse: Pulse) -> Outcome | Left:
        """Watch the process until there is a result, or a reason to end it."""
        limits = pulse.claim.spec.limits
        began = progressed = time.monotonic()
        oom_before = ending.oom_kills()
        child.give(request)  # a process that is gone already is noticed below
        try:
            while True:
                for line in child.read(self.settings.poll_s):
                    progressed = time.monotonic()
                    outcome = self._hear(line, pulse)
                    if outcome is not None:
                        return outcome
                if child.exited():
                    return self._last_words(child, pulse) or ending.crashed(
                        child.end(), child.log, oom_before, ending.oom_kills()
                    )
                if self.stopping.is_set():
                    return Left.STOPPED
                signal = pulse.beat()
                if signal is not Signal.CONTINUE:
                    return Cancelled() if signal is Signal.CANCEL else Left.LOST
                if time.monotonic() - began > limits.run_s:
                    return ending.over_run_limit(limits)
                if time.monotonic() - progressed > limits.no_progress_s:
                    return ending.over_progress_limit(limits, pulse.stage)
        except (BadMessage, ForbiddenMove) as error:
            log.exception("%s: the job process broke the protocol", pulse.claim.job_id)
            return ending.unreadable(str(error))

    def _last_words(self, child: Child, pulse: Pulse) -> Outcome | None:
        for line in child.drain():
            outcome = self._hear(line, pulse)
            if outcome is not None:
                return outcome
        return None

    def _hear(self, line: bytes, pulse: Pulse) -> Outcome | None:
        """Take in one message; the outcome if it is that. Raises BadMessage, ForbiddenMove."""
        try:
            message: dict[str, Any] = json.loads(line, parse_constant=lambda _: None)
            match message["type"]:
                case "ready":
                    pass
                case "stage":
                    state = State(message["state"])
                    progress = Progress(done=message["done"], total=message["total"], eta_s=message["eta_s"])
                    pulse.note(Step(state, message["stage"], progress))
                    if state is State.PACKAGING:
                        self.warm_up()
                case "event":
                    pulse.event(message["kind"], dict(message["data"]))
                case "outcome":
                    content = json.loads(line)  # with infinities, which a report may hold
                    del content["type"]
                    return _OUTCOME.validate_python(content, strict=False)
                case other:
                    raise BadMessage(f"unknown message type {other!r}")
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            start = line[:200].decode(errors="replace")
            raise BadMessage(f"not a message: {start!r}: {type(error).__name__}: {error}") from error
        return None

    def _record(self, pulse: Pulse, outcome: Outcome) -> State | None:
        """Publish what the job made, write how it ended, and remove what is not kept."""
        claim, artifact = pulse.claim, None
        if isinstance(outcome, Succeeded | Rejected):
            try:
                check_files(self.storage.part(claim.job_id, claim.epoch), outcome.manifest)
                artifact = self._publish(pulse)
            except OSError as error:
                outcome = Failed(error=DiskFull(f"the result could not be stored: {error}").as_job_error())
            except ExportError as error:
                outcome = Failed(error=error.as_job_error())
        state = self._finish(claim, outcome, artifact)
        log.info("%s: attempt %d ended: %s", claim.job_id, claim.epoch, state or "overtaken")
        if state not in (State.SUCCEEDED, State.REJECTED):
            self.storage.discard(claim.job_id, claim.epoch)
        if state is State.SUCCEEDED:
            self.storage.drop_checkpoints(claim.job_id)
        return state

    def _publish(self, pulse: Pulse) -> str:
        """Put the files on disk, which can take minutes: the lease is renewed meanwhile. Raises OSError."""
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(self.storage.publish, pulse.claim.job_id, pulse.claim.epoch)
            while not done.done():
                wait([done], timeout=self.settings.poll_s)
                pulse.beat()
            return done.result()

    def _finish(self, claim: Claim, outcome: Outcome, artifact: str | None) -> State | None:
        """Write the end, waiting for a database that is away. Raises DBAPIError if it stays away."""
        deadline = time.monotonic() + _RECORD_FOR_S
        while True:
            try:
                with self.sessions() as session:
                    return leases.finish(session, claim, outcome, artifact=artifact)
            except DBAPIError as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("%s: its end could not be written; trying again: %s", claim.job_id, error)
                time.sleep(1)

    def _release(self, claim: Claim) -> State | None:
        self.storage.discard(claim.job_id, claim.epoch)
        with self.sessions() as session:
            return leases.release(session, claim, f"worker {claim.worker} was stopped")


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raises ExportError unless every file of the manifest lies there in its size."""
    for entry in manifest.files:
        path = folder / entry.path
        size = path.stat().st_size if path.is_file() else None
        if size != entry.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise ExportError(f"{entry.path} {found}, and the manifest says {entry.bytes} bytes")
