"""A job process for tests, `python -m child_jobs`: it behaves as the job's label `behave` says.

It speaks the real protocol through the real `worker.process`; only the pipeline is another.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TextIO

from quantry.jobs import Outcome, Rejected, State, Succeeded
from quantry.reports import CostReport, FileEntry, Loader, Manifest, QualityRow, Report, SizeReport
from worker import process
from worker.errors import NonFiniteError
from worker.progress import Progress
from worker.workspace import JobInput


def succeed(job: JobInput, progress: Progress) -> Outcome:
    return work(job, progress, seconds=0.0)


def slow(job: JobInput, progress: Progress) -> Outcome:
    return work(job, progress, seconds=float(job.spec.labels.get("seconds", "2")))


def long_first(job: JobInput, progress: Progress) -> Outcome:
    """Hours in the first attempt, an instant in the second: the job survives only if it is run again."""
    return work(job, progress, seconds=3600 if job.attempt == 1 else 0.0)


def work(job: JobInput, progress: Progress, seconds: float) -> Outcome:
    progress.stage(State.PREPARING, "reading")
    progress.stage(State.QUANTIZING, "blocks", 0, 10)
    (job.workspace.checkpoints / "block-0").write_text("kept until the job succeeds")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        progress.advance(int(10 * (1 - (end - time.monotonic()) / seconds)), 10)
        time.sleep(min(0.05, seconds))
    progress.event("block", {"index": 0, "relative_mse": float("nan")})
    return write(job, progress)


def write(job: JobInput, progress: Progress) -> Outcome:
    progress.stage(State.PACKAGING, "writing")
    data = f"{job.job} attempt {job.attempt}".encode()
    (job.workspace.artifact / "model.safetensors").write_bytes(data)
    return Succeeded(report=report(), manifest=manifest(job.job, data))


def manifest(job: str, data: bytes) -> Manifest:
    entry = FileEntry(path="model.safetensors", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    loader = Loader(package="transformers", version="5", snippet="...")
    return Manifest(job=job, format="quantry", loader=loader, files=(entry,))


def report() -> Report:
    return Report(
        quality=(
            QualityRow(metric="perplexity", dataset="d", samples=1, fp=2.0, rtn=float("inf"), quantized=3.0),
        ),
        size=SizeReport(fp_bytes=8, quantized_bytes=2, effective_bits=4.0, quantized_weights=4),
        layers=(),
        blocks=(),
        cost=CostReport(wall_s=1.0, cpu_s=1.0, peak_rss_bytes=1),
        environment={},
        fingerprint="f",
        format="quantry",
    )


def reject(job: JobInput, progress: Progress) -> Outcome:
    made = work(job, progress, seconds=0.0)
    assert isinstance(made, Succeeded)
    return Rejected(
        report=made.report, manifest=made.manifest, detail="perplexity rose by 50 %, allowed 10 %"
    )


def missing_file(job: JobInput, progress: Progress) -> Outcome:
    made = work(job, progress, seconds=0.0)
    (job.workspace.artifact / "model.safetensors").unlink()
    return made


def hang(job: JobInput, progress: Progress) -> Outcome:
    progress.stage(State.QUANTIZING, "a block without end", 1, 10)
    time.sleep(3600)
    raise AssertionError


def fork(job: JobInput, progress: Progress) -> Outcome:
    """Start processes of its own, as data loaders do, and wait for ever."""
    sleeper = [sys.executable, "-c", "import time; time.sleep(3600)"]
    started = [subprocess.Popen(sleeper, stdin=subprocess.DEVNULL) for _ in range(2)]
    progress.event("log", {"pids": [os.getpid(), *(one.pid for one in started)]})
    return hang(job, progress)


def orphan(job: JobInput, progress: Progress) -> Outcome:
    """Succeed, but leave a process behind."""
    sleeper = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(3600)"], stdin=subprocess.DEVNULL
    )
    progress.event("log", {"pids": [sleeper.pid]})
    return work(job, progress, seconds=0.0)


def killed(job: JobInput, progress: Progress) -> Outcome:
    progress.stage(State.QUANTIZING, "block 1", 1, 10)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def crash(job: JobInput, progress: Progress) -> Outcome:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def abort(job: JobInput, progress: Progress) -> Outcome:
    """What a library in Rust does when an allocation fails, with a long backtrace."""
    print("memory allocation of 20 bytes failed\n" + "   0: frame\n" * 1000, file=sys.stderr, flush=True)
    os.abort()


def leave(job: JobInput, progress: Progress) -> Outcome:
    print("the last line before the end", flush=True)
    os._exit(3)


def garbage(job: JobInput, progress: Progress) -> Outcome:
    progress._out.write("\x00 this is no JSON\n")
    progress._out.flush()
    return hang(job, progress)


def backwards(job: JobInput, progress: Progress) -> Outcome:
    progress.stage(State.PACKAGING, "too early")
    progress.stage(State.QUANTIZING, "back again")
    return hang(job, progress)


def chatter(job: JobInput, progress: Progress) -> Outcome:
    print("x" * 100_000, flush=True)  # libraries print what they like; it is no message
    progress.stage(State.QUANTIZING, "blocks", 0, 5000)
    for done in range(5000):
        progress.advance(done, 5000)
        progress.event("warning", {"number": done}) if done % 100 == 0 else None
    return write(job, progress)


def eat_memory(job: JobInput, progress: Progress) -> Outcome:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
    held = [bytearray(2**26) for _ in range(1000)]
    raise AssertionError(len(held))


def fill_disk(job: JobInput, progress: Progress) -> Outcome:
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")
    except OSError as error:
        raise RuntimeError("safetensors: I/O error") from error


def not_finite(job: JobInput, progress: Progress) -> Outcome:
    raise NonFiniteError("block 3: the output of mlp.down_proj has NaN")


def bug(job: JobInput, progress: Progress) -> Outcome:
    raise KeyError("secret path /home/somebody")


BEHAVIOUR: dict[str, Callable[[JobInput, Progress], Outcome]] = {
    function.__name__: function
    for function in (
        succeed, slow, long_first, reject, missing_file, hang, fork, orphan, killed, crash, abort, leave, garbage,
        backwards, chatter, eat_memory, fill_disk, not_finite, bug,
    )
}  # fmt: skip


def serve(requests: queue.SimpleQueue[bytes], out: TextIO) -> None:
    """As `worker.process.serve`, with a behaviour in the place of the pipeline."""
    progress = Progress(out)
    progress.message({"type": "ready"})
    job = JobInput.model_validate_json(requests.get())
    behave = BEHAVIOUR[job.spec.labels.get("behave", "succeed")]
    outcome = process.guarded(lambda: behave(job, progress))
    progress.message({"type": "outcome", **outcome.model_dump(mode="json")})


if __name__ == "__main__":
    process.main(serve)
    os._exit(0)
