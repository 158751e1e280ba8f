"""`quantry-server serve` from outside: real processes, a real broker, real kills.

Jobs run a stand-in for the pipeline (`child_jobs`), everything around it is what users run.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.service.processes import WAIT_S, await_gone, await_that

ENVIRONMENT = {
    "QUANTRY_JOB_MODULE": "child_jobs",
    "QUANTRY_LEASE_S": "4",
    "QUANTRY_HEARTBEAT_S": "1",
    "QUANTRY_POLL_S": "0.2",
    "QUANTRY_RING_AGAIN_S": "2",
    "QUANTRY_DEVICE": "cpu",
    "PYTHONPATH": str(Path(__file__).parent),
}


def family(process: psutil.Process) -> list[int]:
    """The process and all below it."""
    return [process.pid, *(child.pid for child in process.children(recursive=True))]


class Server:
    """One `quantry-server serve` on a data folder, and a client of its API."""

    environment = ENVIRONMENT

    def __init__(self, data: Path) -> None:
        self.data = data
        self.start()

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("QUANTRY_")}
        self.log = (self.data.parent / "serve.log").open("ab")
        command = [sys.executable, "-m", "app", "serve", "--data", str(self.data), "--port", "0"]
        self.process = subprocess.Popen(
            command, env={**environment, **self.environment}, stdout=subprocess.PIPE, stderr=self.log
        )
        assert self.process.stdout is not None
        self.said = []
        while (line := self.process.stdout.readline().decode()) and line != "ready\n":
            self.said.append(line.strip())
        assert line == "ready\n", (self.data.parent / "serve.log").read_text()
        self.url = self.said[0].rpartition(" ")[2]

    @property
    def key(self) -> str:
        return (self.data / "api-key").read_text().strip()

    def call(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return json.load(answer)

    def submit(self, behave: str, **labels: str) -> str:
        body = {"model": "bundled/opt-tiny", "bits": 4, "labels": {"behave": behave, **labels}}
        return str(self.call("POST", "/v1/jobs", body)["id"])

    def job(self, job_id: str) -> Any:
        return self.call("GET", f"/v1/jobs/{job_id}")

    def await_state(self, job_id: str, *states: str, wait_s: float = WAIT_S) -> Any:
        found = {}

        def reached() -> bool:
            found.update(self.job(job_id))
            return found["state"] in states

        await_that(reached, f"{job_id} never came to {states}: {found}", wait_s)
        return found

    def tree(self) -> list[int]:
        """Every process of this server, the supervisor first."""
        return family(psutil.Process(self.process.pid))

    def child(self, part: str) -> psutil.Process:
        """The process whose command line has `part`."""

        def find() -> psutil.Process | None:
            for pid in self.tree():
                try:
                    process = psutil.Process(pid)
                    if part in " ".join(process.cmdline()):
                        return process
                except psutil.NoSuchProcess:
                    continue
            return None

        return await_that(find, f"no process with {part!r}")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(WAIT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.close()


API, WORKER, BROKER = "app api", "-m worker", "unixsocket"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests that leave it running."""
    server = Server(tmp_path_factory.mktemp("serve") / "data")
    yield server
    everything = server.tree()
    server.stop()
    await_gone(everything)


def running_pids(server: Server, job_id: str) -> list[int]:
    """The processes of a `fork` job, once it runs."""

    def told() -> list[int] | None:
        events = server.call("GET", f"/v1/jobs/{job_id}/events")["items"]
        return next((event["data"]["pids"] for event in events if "pids" in event["data"]), None)

    found = await_that(told, f"{job_id} never told its processes")
    return list(found)


def test_it_says_where_it_is_and_keeps_its_key_private(server: Server) -> None:
    assert server.said[1] == f"API key: {server.data / 'api-key'}"
    assert stat.S_IMODE((server.data / "api-key").stat().st_mode) == 0o600
    assert server.key.startswith("qz_")


def test_a_job_runs_to_its_end(server: Server) -> None:
    job_id = server.submit("succeed")
    job = server.await_state(job_id, "succeeded", "failed")
    assert (job["state"], job["attempt"]) == ("succeeded", 1)
    assert [attempt["outcome"] for attempt in server.call("GET", f"/v1/jobs/{job_id}/attempts")["items"]] == [
        "succeeded"
    ]


def test_cancel_ends_a_running_job_and_its_processes(server: Server) -> None:
    job_id = server.submit("fork")
    pids = running_pids(server, job_id)
    server.call("POST", f"/v1/jobs/{job_id}/cancel")
    server.await_state(job_id, "cancelled")
    await_gone(pids)


def test_doubled_doorbells_start_a_job_once(server: Server) -> None:
    from app.shared import queue

    job_id = server.submit("slow", seconds="1")
    app = queue.make_celery(f"unix://{server.data / 'broker.sock'}", connect_retries=0)
    for _ in range(6):
        app.send_task(queue.QUANTIZE, args=[job_id], queue=queue.QUEUE.name)
    app.close()
    server.await_state(job_id, "succeeded")
    other = server.submit("succeed")  # behind the six in the queue
    server.await_state(other, "succeeded")
    assert server.job(job_id)["attempt"] == 1


def test_a_killed_worker_loses_nothing(server: Server) -> None:
    job_id = server.submit("long_first")
    server.await_state(job_id, "quantizing")
    worker = server.child(WORKER)
    everything = family(worker)
    worker.kill()
    await_gone(everything)

    job = server.await_state(job_id, "succeeded", "failed")
    assert (job["state"], job["attempt"]) == ("succeeded", 2)
    attempts = server.call("GET", f"/v1/jobs/{job_id}/attempts")["items"]
    assert [attempt["outcome"] for attempt in attempts] == ["lost", "succeeded"]


def test_a_killed_job_process_is_a_typed_failure(server: Server) -> None:
    job_id = server.submit("fork")
    pids = running_pids(server, job_id)
    os.kill(pids[0], signal.SIGKILL)
    job = server.await_state(job_id, "failed")
    assert job["error"]["type"] == "process-killed"
    await_gone(pids)


def test_a_killed_broker_loses_nothing(server: Server) -> None:
    running = server.submit("slow", seconds="3")
    server.await_state(running, "quantizing")
    waiting = [server.submit("succeed") for _ in range(3)]
    server.child(BROKER).kill()
    late = server.submit("succeed")  # the API takes jobs while the broker is away

    for job_id in (running, *waiting, late):
        assert server.await_state(job_id, "succeeded", "failed")["attempt"] == 1


def test_a_killed_api_comes_back_on_the_same_port(server: Server) -> None:
    job_id = server.submit("slow", seconds="2")
    api = server.child(API)
    api.kill()
    await_gone([api.pid])
    assert server.await_state(job_id, "succeeded")["attempt"] == 1  # the listening socket never closed


def test_a_frozen_worker_is_fenced(server: Server) -> None:
    """Past its lease the job is queued again; thawed, the worker drops its copy and runs the new attempt."""
    job_id = server.submit("long_first")
    server.await_state(job_id, "quantizing")
    worker = server.child(WORKER)
    copy = [child.pid for child in worker.children()]
    worker.suspend()
    try:
        server.await_state(job_id, "queued")
    finally:
        worker.resume()
    job = server.await_state(job_id, "succeeded", "failed")
    assert (job["state"], job["attempt"]) == ("succeeded", 2)
    await_gone(copy)


def test_stopped_or_killed_it_leaves_no_orphan_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    server = Server(tmp_path / "data")
    try:
        key = server.key
        running = server.submit("long_first")
        server.await_state(running, "quantizing")
        waiting = server.submit("succeed")
        end(server, signal.SIGTERM, status=0)

        server.start()
        assert server.key == key
        assert server.await_state(running, "succeeded", "failed")["attempt"] == 2
        assert server.await_state(waiting, "succeeded", "failed")["attempt"] == 1
        forked = server.submit("fork")
        running_pids(server, forked)
        assert len(server.tree()) >= 7  # supervisor, broker, api, worker, the job and its two
        end(server, signal.SIGKILL, status=-signal.SIGKILL)

        server.start()
        await_that(lambda: server.job(forked)["attempt"] == 2, "the job was not taken up again")
        server.call("POST", f"/v1/jobs/{forked}/cancel")
        server.await_state(forked, "cancelled")
        end(server, signal.SIGINT, status=0)
    finally:
        server.stop()


def end(server: Server, how: signal.Signals, status: int) -> None:
    """Signal the supervisor, and see that everything it started is gone."""
    everything = server.tree()
    server.process.send_signal(how)
    assert server.process.wait(WAIT_S) == status
    await_gone(everything)
    server.stop()


def refused(*arguments: str, **environment: str) -> str:
    """What `quantry-server` says when it cannot start."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("QUANTRY_")}
    command = [sys.executable, "-m", "app", *arguments]
    run = subprocess.run(
        command, env={**inherited, **environment}, capture_output=True, text=True, timeout=WAIT_S
    )
    assert run.returncode == 2, run
    assert "Traceback" not in run.stderr
    return run.stderr


def test_a_second_serve_on_the_folder_is_refused(server: Server) -> None:
    said = refused("serve", "--data", str(server.data), "--port", "0")
    assert f"process {server.process.pid}" in said
    assert str(server.data) in said


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused("serve", "--data", str(tmp_path), "--port", str(port))
    assert f"port {port}" in said
    assert "in use" in said


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in refused("serve", "--data", str(tmp_path / "file" / "data"), "--port", "0")


def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    said = refused("serve", "--data", str(tmp_path), QUANTRY_LEASE_S="much")
    assert "QUANTRY_LEASE_S" in said


@pytest.mark.parametrize("command", ["api", "worker"])
def test_a_part_without_broker_or_schema_is_refused(tmp_path: Path, command: str) -> None:
    assert "QUANTRY_REDIS_URL" in refused(command, QUANTRY_DATA=str(tmp_path))
    said = refused(command, QUANTRY_DATA=str(tmp_path), QUANTRY_REDIS_URL="unix:///nowhere.sock")
    assert "quantry-server migrate" in said
