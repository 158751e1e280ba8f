"""Show Quantry end to end: a real server, two real jobs, and a checkpoint that stock tools load.

usage: python scripts/demo.py [--bits 3] [--windows 96] [--keep FOLDER]

Starts `quantry-server serve` on a free port and an empty data folder, submits GPTQ with and without bias
compensation, follows both, downloads the corrected checkpoint, compares every digest, and lets a separate
process with nothing but transformers load it, write a line and measure its perplexity once more. Ends
with 0 only if all of that worked. Whether each method improved on the one before is printed, as measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from urllib.request import urlopen

from rich.console import Console
from rich.table import Table

from quantry.bundled import bundled_model, bundled_text
from quantry.cli.render import LiveJob
from quantry.client import Client, QuantryError
from quantry.jobs import JobRead, State
from quantry.reports import Manifest, Report
from quantry.wording import bytes_text

MODEL, TEXT = "bundled/opt-tiny", "bundled/pydoc"
START_S = 60.0  # how long the server may take to be ready
STOP_S = 30.0
AGREEMENT = 0.005  # relative: bfloat16 forwards of the job against float32 forwards here

# What a user who never heard of Quantry would run: transformers, and nothing of ours.
STOCK_USER = """
import json, math, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file, length, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("Return True if the", return_tensors="pt")
written = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
line = tokenizer.decode(written, skip_special_tokens=True)
stream = torch.tensor(tokenizer(open(file, encoding="utf-8").read(), verbose=False).input_ids)
windows = stream[: len(stream) // length * length].view(-1, length)[:count]
total = 0.0
with torch.no_grad():
    for part in windows.split(8):
        log_p = model(part).logits[:, :-1].log_softmax(-1)
        total -= log_p.gather(2, part[:, 1:, None]).double().sum().item()
assert "quantry" not in sys.modules
print(json.dumps({"line": line, "perplexity": math.exp(total / windows[:, 1:].numel())}))
"""


class DemoError(Exception):
    """Something that should work did not; the message says what."""


@dataclass(frozen=True)
class Result:
    name: str
    job: JobRead
    report: Report
    seconds: float


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(folder: Path, log: Path) -> Iterator[str]:
    """A server on `folder` for the length of the block; yields its URL once it is ready."""
    port = free_port()
    command = [sys.executable, "-m", "app", "serve", "--data", str(folder), "--port", str(port)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("QUANTRY_")}
    environment = clean | {"QUANTRY_DATA": str(folder), "QUANTRY_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, folder / "api-key", process)
        yield url
    finally:
        stop(process)


def wait_until_ready(url: str, key: Path, process: subprocess.Popen[bytes]) -> None:
    """Return once the server answers and has written its first key. Raises DemoError."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoError(f"the server ended with code {process.returncode}")
        if key.exists() and ready(url):
            return
        time.sleep(0.1)
    raise DemoError(f"the server was not ready after {START_S:.0f} s")


def ready(url: str) -> bool:
    """Whether `/readyz` says that the database, the broker and the storage are there."""
    try:
        with urlopen(f"{url}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:  # HTTP errors too: it is 503 until every part is up
        return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server the way an operator does; it takes its worker and broker along."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise DemoError(f"the server did not stop within {STOP_S:.0f} s of SIGTERM") from None


def run(client: Client, console: Console, name: str, request: dict[str, Any]) -> Result:
    """Submit one job and follow it to its end. Raises DemoError unless it succeeds."""
    begin = time.monotonic()
    submitted = client.submit(**request)
    console.print(f"[bold]{name}[/]: {submitted.id}")
    with LiveJob(console) as live:
        for job in client.watch(submitted, timeout=600):
            live.show(job)
    if job.state is not State.SUCCEEDED:
        reason = f"{job.error.title}: {job.error.detail}" if job.error else "no reason given"
        raise DemoError(f"{name} ended as {job.state.value}: {reason}")
    return Result(name, job, client.report(job), time.monotonic() - begin)


def check_digests(folder: Path, manifest: Manifest) -> int:
    """Hash every file anew; return the number of bytes. Raises DemoError for one that differs."""
    for entry in manifest.files:
        if hashlib.sha256((folder / entry.path).read_bytes()).hexdigest() != entry.sha256:
            raise DemoError(f"{entry.path} does not have the sha256 of the manifest")
    return sum(entry.bytes for entry in manifest.files)


def load_as_stock_user(folder: Path, text: Path, windows: int) -> dict[str, Any]:
    """What transformers alone makes of the checkpoint. Raises DemoError."""
    length = json.loads((bundled_model(MODEL) / "config.json").read_text())["max_position_embeddings"]
    command = [sys.executable, "-c", STOCK_USER, str(folder), str(text), str(length), str(windows)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoError(f"transformers could not use the checkpoint:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def perplexity(result: Result, which: Literal["fp", "rtn", "quantized"]) -> float:
    """One perplexity of a job's report. Raises DemoError if it is not there."""
    row = next((row for row in result.report.quality if row.metric == "perplexity"), None)
    value: float | None = getattr(row, which, None)
    if value is None:
        raise DemoError(f"{result.name}: the report has no perplexity {which!r}")
    return value


def table(plain: Result, corrected: Result, bits: int) -> tuple[Table, list[tuple[str, float]]]:
    """The comparison that the demo is about, and its perplexities in the order of the claim."""
    fp = perplexity(plain, "fp")
    ranking = [
        (f"RTN-{bits}", perplexity(plain, "rtn")),
        (f"GPTQ-{bits}", perplexity(plain, "quantized")),
        (f"GPTQ-{bits} + compensation", perplexity(corrected, "quantized")),
    ]
    view = Table(title=f"{MODEL} on the held-out part of {TEXT}", title_justify="left", title_style="bold")
    for heading in ("weights", "perplexity", "over FP", "size", "bits a weight", "seconds"):
        view.add_column(heading, justify="left" if heading == "weights" else "right")
    view.add_row("full precision", f"{fp:.3f}", "", bytes_text(plain.report.size.fp_bytes), "16", "")
    for (name, value), columns in zip(ranking, [("", "", ""), facts(plain), facts(corrected)], strict=True):
        view.add_row(name, f"{value:.3f}", f"{value / fp - 1:+.2%}", *columns)
    return view, ranking


def facts(result: Result) -> tuple[str, str, str]:
    size = result.report.size
    return bytes_text(size.quantized_bytes), f"{size.effective_bits:.2f}", f"{result.seconds:.1f}"


def verdict(ranking: list[tuple[str, float]]) -> str:
    """Whether each line of the table is better than the one above it, in words."""
    claim = " > ".join(name for name, _ in ranking)
    broken = [
        f"{after} ({y:.3f}) is not better than {before} ({x:.3f})"
        for (before, x), (after, y) in pairwise(ranking)
        if y >= x
    ]
    if broken:
        return f"[yellow]The order {claim} does not hold here:[/] {'; '.join(broken)}."
    return f"[green]The order {claim} holds[/] (lower is better)."


def demonstrate(console: Console, bits: int, windows: int, workspace: Path) -> None:
    """The whole show. Raises DemoError or QuantryError if any part of it fails."""
    begin = time.monotonic()
    with server(workspace / "server", workspace / "server.log") as url:
        console.print(f"server ready at {url} after {time.monotonic() - begin:.1f} s")
        with Client(url, (workspace / "server" / "api-key").read_text().strip()) as client:
            request: dict[str, Any] = {"model": MODEL, "bits": bits, "method": "gptq"}
            request |= {"calibration": {"samples": windows}, "evaluation": {"samples": windows}}
            plain = run(client, console, f"GPTQ-{bits}", request)
            request |= {"correction": "bias_compensation"}
            request["evaluation"] |= {"baselines": []}  # known from the first job
            corrected = run(client, console, f"GPTQ-{bits} + compensation", request)
            artifact = workspace / "checkpoint"
            size = check_digests(artifact, client.download(corrected.job, artifact))
    console.print(f"downloaded {bytes_text(size)}; every sha256 is right; server stopped")

    text = workspace / "test.txt"
    text.write_text(bundled_text(TEXT, "test"), encoding="utf-8")
    stock = load_as_stock_user(artifact, text, windows)
    reported = perplexity(corrected, "quantized")
    if abs(stock["perplexity"] / reported - 1) > AGREEMENT:
        raise DemoError(f"transformers measures {stock['perplexity']:.3f}, the report says {reported:.3f}")
    console.print(f"stock transformers loads it, measures perplexity {stock['perplexity']:.3f}, and writes:")
    console.print(f"  {stock['line']!r}", style="cyan", markup=False, highlight=False)

    view, ranking = table(plain, corrected, bits)
    console.print(view)
    console.print(verdict(ranking))
    console.print(f"All of it took {time.monotonic() - begin:.1f} s.")


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--bits", type=int, default=3, choices=(2, 3, 4, 5, 6, 8))
    options.add_argument("--windows", type=int, default=96, help="of text, to calibrate and to evaluate with")
    options.add_argument("--keep", type=Path, help="work in this empty folder and leave it there")
    arguments = options.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="quantry-demo-") as scratch:
        workspace = (arguments.keep or Path(scratch)).absolute()
        workspace.mkdir(parents=True, exist_ok=True)
        try:
            demonstrate(console, arguments.bits, arguments.windows, workspace)
        except (DemoError, QuantryError) as error:
            console.print(f"The demo failed: {error}", style="red", markup=False)
            log = workspace / "server.log"
            if log.exists():
                console.print("The end of the server's log:", style="red")
                console.print(
                    "".join(log.read_text(errors="replace").splitlines(keepends=True)[-40:]), markup=False
                )
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
