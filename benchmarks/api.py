"""How fast the API is: submits at a fixed rate, status polls with 304, downloads; against a real server.

    python benchmarks/api.py [--seconds 10] [--redis redis://127.0.0.1:6379/9]

Starts `quantry-server api` on an empty SQLite database in a temporary folder, with an embedded broker unless
one is given, and no worker, so that the processor is the API's and this script's. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from app.broker import find_server
from app.shared import jobs, leases
from app.shared.database import make_engine, make_sessions
from app.shared.storage import Storage
from quantry.jobs import Succeeded
from quantry.reports import CostReport, FileEntry, Loader, Manifest, Report, SizeReport
from quantry.requests import JobRequest

FILE_BYTES = 1 << 30
REQUEST = {"model": "bundled/opt-tiny", "bits": 4, "method": "gptq", "correction": "bias_compensation"}
PACKAGES = ("fastapi", "starlette", "uvicorn", "sqlalchemy", "pydantic", "celery")


@dataclass(frozen=True)
class Server:
    """Where the server is, the key to use, and where its files lie."""

    port: int
    key: str
    data: Path
    process: subprocess.Popen[bytes]

    def head(self, method: str, path: str, *lines: str) -> bytes:
        fields = ["Host: localhost", f"Authorization: Bearer {self.key}", *lines]
        return "\r\n".join([f"{method} {path} HTTP/1.1", *fields, "", ""]).encode()

    def cpu_s(self) -> float:
        """Processor seconds that the server has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Connection:
    """One keep-alive connection, with as much HTTP as is needed: the processor is for the server."""

    def __init__(self, server: Server) -> None:
        self.server = server

    async def open(self) -> Connection:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        return self

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body."""
        self.writer.write(request)
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        at = head.find(b"content-length: ")
        size = int(head[at + 16 : head.index(b"\r\n", at)]) if at >= 0 else 0
        return int(head[9:12]), await self.reader.readexactly(size)

    def close(self) -> None:
        self.writer.close()


async def submits(server: Server, *, rate: int, seconds: float) -> list[float]:
    """Latencies of submits sent on a fixed clock, whether or not the ones before have been answered."""
    idle: asyncio.Queue[Connection] = asyncio.Queue()
    for _ in range(32):
        idle.put_nowait(await Connection(server).open())
    latencies: list[float] = []

    async def one(number: int, due: float) -> None:
        connection = await idle.get()
        body = json.dumps({**REQUEST, "calibration": {"samples": 64, "seed": number}}).encode()
        lines = (
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            f"Idempotency-Key: n{number}",
        )
        status, answer = await connection.ask(server.head("POST", "/v1/jobs", *lines) + body)
        latencies.append(time.perf_counter() - due)
        if status != 202:
            raise RuntimeError(f"submit answered {status}: {answer[:300]!r}")
        idle.put_nowait(connection)

    start = time.perf_counter() + 0.1
    tasks = []
    for number in range(int(rate * seconds)):
        due = start + number / rate
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        tasks.append(asyncio.create_task(one(number, due)))
    await asyncio.gather(*tasks)
    return latencies


async def polls(server: Server, job_ids: list[str], *, connections: int, seconds: float) -> list[float]:
    """Latencies of polls that each get a 304, each connection asking again as soon as it is answered."""
    etags = {}
    first = await Connection(server).open()
    for job_id in job_ids:
        first.writer.write(server.head("HEAD", f"/v1/jobs/{job_id}"))
        head = (await first.reader.readuntil(b"\r\n\r\n")).decode()
        etags[job_id] = next(line[6:] for line in head.split("\r\n") if line.lower().startswith("etag: "))
    latencies: list[float] = []
    stop = time.perf_counter() + seconds

    async def ask(job_id: str) -> None:
        connection = await Connection(server).open()
        request = server.head("GET", f"/v1/jobs/{job_id}", f"If-None-Match: {etags[job_id]}")
        while (before := time.perf_counter()) < stop:
            status, _ = await connection.ask(request)
            latencies.append(time.perf_counter() - before)
            if status != 304:
                raise RuntimeError(f"a poll answered {status}")
        connection.close()

    await asyncio.gather(*(ask(job_ids[index % len(job_ids)]) for index in range(connections)))
    return latencies


def download(server: Server, path: str) -> float:
    """Megabytes a second of one file over one connection, its bytes thrown away."""
    buffer = bytearray(1 << 20)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        before = time.perf_counter()
        connection.sendall(server.head("GET", path))
        received, expected = 0, FILE_BYTES
        while received < expected:
            count = connection.recv_into(buffer)
            if received == 0 and not buffer.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"the download answered {bytes(buffer[:100])!r}")
            received += count
            if not count:
                raise RuntimeError("the connection broke")
        return FILE_BYTES / 1e6 / (time.perf_counter() - before)


def publish_file(server: Server) -> str:
    """A succeeded job with one large file, as a worker leaves it. Returns its id."""
    sessions = make_sessions(make_engine(f"sqlite:///{server.data}/quantry.db"))
    storage = Storage(server.data / "storage")
    with sessions() as session:
        job = jobs.submit(session, JobRequest(**REQUEST).resolve(), owner="bench")[0]
        claim = leases.claim(session, job.id, worker="bench")
    assert claim is not None
    part = storage.open_part(claim.job_id, claim.epoch)
    digest, block = hashlib.sha256(), os.urandom(1 << 22)
    with (part / "model.safetensors").open("wb") as file:
        for _ in range(FILE_BYTES // len(block)):
            file.write(block)
            digest.update(block)
    entry = FileEntry(path="model.safetensors", bytes=FILE_BYTES, sha256=digest.hexdigest())
    loader = Loader(package="transformers", version="5", snippet="")
    manifest = Manifest(job=claim.job_id, format="quantry", loader=loader, files=(entry,))
    (part / "manifest.json").write_text(manifest.model_dump_json())
    report = Report(
        quality=(),
        size=SizeReport(fp_bytes=1, quantized_bytes=1, effective_bits=4, quantized_weights=1),
        layers=(),
        blocks=(),
        cost=CostReport(wall_s=1, cpu_s=1, peak_rss_bytes=1),
        environment={},
        fingerprint="",
        format="quantry",
    )
    with sessions() as session:
        outcome = Succeeded(report=report, manifest=manifest)
        leases.finish(session, claim, outcome, artifact=storage.publish(claim.job_id, claim.epoch))
    return claim.job_id


def start(stack: ExitStack, redis: str | None) -> Server:
    """The server, ready; it ends with the stack."""
    data = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if redis is None:
        address = data / "broker.sock"
        options = ["--port", "0", "--unixsocket", str(address), "--appendonly", "yes", "--dir", str(data)]
        broker = subprocess.Popen([find_server(), *options], stdout=subprocess.DEVNULL)
        stack.callback(broker.wait)
        stack.callback(broker.terminate)
        redis = f"unix://{address}"
    environment = {**os.environ, "QUANTRY_DATA": str(data), "QUANTRY_REDIS_URL": redis}
    command = [sys.executable, "-m", "app"]
    subprocess.run([*command, "migrate"], env=environment, check=True, capture_output=True)
    made = subprocess.run(
        [*command, "keys", "create", "bench", "--owner", "bench"],
        env=environment,
        check=True,
        capture_output=True,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = stack.enter_context((data / "server.log").open("wb"))
    process = subprocess.Popen(
        [*command, "api", "--port", str(port)], env=environment, stderr=log, stdout=log
    )
    stack.callback(process.wait)
    stack.callback(process.terminate)
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return Server(port, made.stdout.decode().split()[-1], data, process)
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise RuntimeError((data / "server.log").read_text())


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def measured(server: Server, work: Callable[[], Awaitable[list[float]]]) -> tuple[list[float], float, float]:
    """Latencies, wall-clock seconds, and milliseconds of processor that the server took a request."""
    cpu, wall = server.cpu_s(), time.perf_counter()
    latencies = asyncio.run(work())  # type: ignore[arg-type]
    return latencies, time.perf_counter() - wall, 1000 * (server.cpu_s() - cpu) / len(latencies)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rate", type=int, default=50, help="submits a second")
    parser.add_argument("--connections", type=int, default=8, help="that poll at once")
    parser.add_argument("--redis", help="a broker; default: the embedded one")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with ExitStack() as stack:
        server = start(stack, options.redis)
        asyncio.run(submits(server, rate=5, seconds=2))  # imports and caches
        submit, _, submit_cpu = measured(
            server, lambda: submits(server, rate=options.rate, seconds=options.seconds)
        )
        job = publish_file(server)
        poll, wall, poll_cpu = measured(
            server, lambda: polls(server, [job], connections=options.connections, seconds=options.seconds)
        )
        url = f"/v1/jobs/{job}/files/model.safetensors"
        download(server, url)
        rates = [download(server, url) for _ in range(5)]
    print("| what | measured | server CPU a request |\n| --- | --- | --- |")
    print(
        f"| submit at {options.rate}/s | p50 {1000 * percentile(submit, 0.5):.1f} ms, "
        f"p99 {1000 * percentile(submit, 0.99):.1f} ms, worst {1000 * max(submit):.1f} ms "
        f"| {submit_cpu:.2f} ms |"
    )
    print(
        f"| poll answered 304, {options.connections} connections | {len(poll) / wall:.0f}/s, "
        f"p99 {1000 * percentile(poll, 0.99):.1f} ms | {poll_cpu:.2f} ms |"
    )
    print(f"| download of {FILE_BYTES >> 20} MiB | {sorted(rates)[2]:.0f} MB/s (best {max(rates):.0f}) | |")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    print(f"\n{machine}; load before: {load:.1f}; SQLite; {versions}; `{' '.join(['python', *sys.argv])}`")


if __name__ == "__main__":
    main()
