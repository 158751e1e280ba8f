"""The command `quantry`, run as a user runs it, against a real server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from app.shared.leases import Claim
from quantry import __version__
from quantry.jobs import JobRead, State
from tests.live_server import MODEL, LiveServer

SMALL = ("--samples", "4", "--seq-len", "32")
FILES = {"model.safetensors": b"weights" * 1000, "config.json": b"{}"}


def run(
    live: LiveServer, *words: str, given: str | None = None, **changes: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantry", *words]
    environment = {**live.environment, **changes}
    return subprocess.run(command, input=given, capture_output=True, text=True, env=environment, timeout=120)


def document(done: subprocess.CompletedProcess[str]) -> Any:
    """The one JSON document on stdout."""
    return json.loads(done.stdout)


def submit(live: LiveServer, *words: str) -> JobRead:
    done = run(live, "submit", MODEL, "--bits", "4", *SMALL, *words, "--json")
    assert done.returncode == 0, done.stderr
    return JobRead.model_validate(document(done))


def start(live: LiveServer, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "quantry", *words]
    pipe = subprocess.PIPE
    interruptible = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs ignore SIGINT
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=live.environment, preexec_fn=interruptible
    )


def end(live: LiveServer, claim: Claim, ending: str) -> None:
    if ending == "failed":
        live.fail(claim)
    else:
        live.succeed(claim, FILES, rejected="too much" if ending == "rejected" else None)


@pytest.mark.parametrize("program", ["quantry", "quantry-server"])
def test_version(program: str) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / program, "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"{program} {__version__}\n")


def test_submit_in_the_short_form(live: LiveServer) -> None:
    recipe = ("--method", "gptq", "--correction", "bias_compensation", "--group-size", "32", "--asymmetric")
    labels = ("--label", "team=a", "--label", "run=1")
    rest = ("--format", "quantry", "--seed", "7", "--accept-increase", "0.1")
    job = submit(live, *recipe, *labels, *rest)
    weights = job.spec.weight_step
    assert (weights.method, weights.bits, weights.group_size, weights.symmetric) == ("gptq", 4, 32, False)
    assert job.spec.compensation is not None
    assert (
        job.spec.calibration.samples,
        job.spec.calibration.sequence_length,
        job.spec.calibration.seed,
    ) == (4, 32, 7)
    assert job.spec.format == "quantry"
    assert job.spec.accept.perplexity_increase_max == 0.1
    assert job.labels == {"team": "a", "run": "1"}


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_submit_the_full_form(live: LiveServer, tmp_path: Path, source: str) -> None:
    spec = {
        "model": {"source": "local", "id": "tiny"},
        "recipe": [{"method": "rtn", "bits": 3, "clip": "mse"}, {"method": "bias_compensation"}],
        "calibration": {"samples": 5, "sequence_length": 16},
        "evaluation": None,
        "labels": {"from": "file"},
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    name = str(tmp_path / "spec.json") if source == "file" else "-"
    done = run(
        live,
        "submit",
        "--spec",
        name,
        "--samples",
        "6",
        "--label",
        "more=x",
        "--json",
        given=json.dumps(spec),
    )
    job = JobRead.model_validate(document(done))
    assert [step.method for step in job.spec.recipe] == ["rtn", "bias_compensation"]
    assert (job.spec.calibration.samples, job.spec.calibration.sequence_length) == (6, 16)
    assert job.labels == {"from": "file", "more": "x"}
    assert job.spec.evaluation is None


def test_local_texts_are_uploaded_once(live: LiveServer, tmp_path: Path) -> None:
    text = tmp_path / "my text.txt"
    text.write_text("Some words of my own. " * 2000, encoding="utf-8")
    first = submit(live, "--calibration", str(text), "--evaluation", str(text))
    second = submit(live, "--calibration", str(text))
    listed = document(run(live, "datasets", "--json"))["items"]
    assert [item["name"] for item in listed] == ["my text.txt"]
    assert first.spec.calibration.dataset.id == second.spec.calibration.dataset.id == listed[0]["id"]
    assert first.spec.evaluation is not None
    assert first.spec.evaluation.dataset.id == listed[0]["id"]


def test_estimate_says_what_would_happen(live: LiveServer) -> None:
    words = ("estimate", MODEL, "--bits", "4", *SMALL)
    done = run(live, *words)
    assert done.returncode == 0
    for part in ("6 quantized", "memory", "time", "compressed-tensors"):
        assert part in done.stdout
    found = document(run(live, *words, "--json"))
    assert found["architecture"] == "OPTForCausalLM"
    assert found["quantized_bytes"] < found["fp_bytes"]


@pytest.mark.parametrize(("ending", "code"), [("succeeded", 0), ("failed", 1), ("rejected", 1)])
def test_watch_tells_each_stage_and_ends_with_the_job(live: LiveServer, ending: str, code: int) -> None:
    job = submit(live)
    watching = start(live, "watch", job.id, "--json")
    assert watching.stderr is not None
    assert watching.stderr.readline().endswith(" queued\n")
    claim = live.claim(job.id)
    assert watching.stderr.readline().endswith(" preparing\n")
    live.step(claim, State.QUANTIZING, "block 1 of 2", 1, 2)
    assert watching.stderr.readline().endswith(" quantizing (block 1 of 2) 1/2 about 1 s left\n")
    end(live, claim, ending)
    out, rest = watching.communicate(timeout=60)
    assert rest.endswith(f" {ending}\n")
    assert watching.returncode == code
    assert json.loads(out)["state"] == ending


def test_submit_watch_and_download_in_one(live: LiveServer, tmp_path: Path) -> None:
    words = ("submit", MODEL, "--bits", "4", *SMALL, "--watch", "--download", str(tmp_path / "out"))
    submitting = start(live, *words)
    assert submitting.stderr is not None
    job = submitting.stderr.readline().split()[0]
    end(live, live.claim(job), "succeeded")
    out, rest = submitting.communicate(timeout=60)
    assert submitting.returncode == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert (tmp_path / "out" / "manifest.json").exists()
    for figure in ("14.000", "19.000 (+35.71 %)", "15.000 (+7.14 %)"):
        assert figure in out
    assert "checked by sha256" in rest


def test_report_as_table_json_and_page(live: LiveServer, tmp_path: Path) -> None:
    job = submit(live)
    live.succeed(live.claim(job.id), FILES)
    shown = run(live, "report", job.id)
    assert shown.returncode == 0
    assert "4.00× smaller" in shown.stdout
    page = tmp_path / "report.html"
    done = run(live, "report", job.id, "--html", str(page), "--json")
    assert document(done)["quality"][0]["quantized"] == 15.0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_download_a_folder_or_a_tar(live: LiveServer, tmp_path: Path) -> None:
    job = submit(live)
    live.succeed(live.claim(job.id), FILES)
    done = run(live, "download", job.id, str(tmp_path / "out"), "--json")
    assert {entry["path"] for entry in document(done)["files"]} >= set(FILES)
    shown = run(live, "download", job.id, "--tar", str(tmp_path / "job.tar"))
    assert "AutoModel.from_pretrained" in shown.stdout
    assert (tmp_path / "job.tar").exists()
    assert run(live, "download", job.id, "somewhere", "--tar", "too").returncode == 2


def test_list_cancel_and_retry(live: LiveServer) -> None:
    jobs = [submit(live, "--label", f"n={n}") for n in range(3)]
    assert [item["id"] for item in document(run(live, "list", "--json"))["items"]] == [
        j.id for j in jobs[::-1]
    ]
    assert [item["id"] for item in document(run(live, "list", "--label", "n=1", "--json"))["items"]] == [
        jobs[1].id
    ]
    assert len(document(run(live, "list", "--limit", "2", "--json"))["items"]) == 2
    assert document(run(live, "cancel", jobs[0].id, "--json"))["state"] == "cancelled"
    listed = run(live, "list", "--state", "cancelled")
    assert jobs[0].id in listed.stdout
    assert jobs[1].id not in listed.stdout
    assert document(run(live, "retry", jobs[0].id, "--json"))["state"] == "queued"


def test_methods_and_models(live: LiveServer) -> None:
    assert "gptq" in run(live, "methods").stdout
    assert {item["method"] for item in document(run(live, "methods", "--json"))["items"]} >= {"rtn", "gptq"}
    assert document(run(live, "models", "--json"))["items"][0]["id"] == "bundled/opt-tiny"


def test_datasets_upload_and_delete(live: LiveServer, tmp_path: Path) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(50)))
    made = document(run(live, "datasets", "upload", str(text), "--name", "b.jsonl", "--json"))
    assert (made["name"], made["documents"]) == ("b.jsonl", 50)
    assert made["id"] in run(live, "datasets").stdout
    assert run(live, "datasets", "delete", made["id"]).returncode == 0
    assert document(run(live, "datasets", "--json"))["items"] == []


REFUSED = [
    (("submit", MODEL, "--bits", "7"), "bits"),
    (("submit", MODEL), "bits"),
    (("submit", "--bits", "4"), "model"),
    (("submit", MODEL, "--bits", "4", "--group-size", "24"), "group_size"),
    (("submit", "bundled/none", "--bits", "4"), "model.id"),
    (("submit", MODEL, "--bits", "4", "--label", "novalue"), "name=value"),
    (("submit", MODEL, "--bits", "4", "--calibration", "missing.txt"), "--calibration"),
    (("submit", "--spec", "missing.json"), "--spec"),
    (("submit", "--no-such-option"), "no-such-option"),
    (("watch", "job_00000000-0000-7000-8000-000000000000"), "404"),
    (("report", "nonsense"), "404"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_what_is_refused_is_said_on_stderr_with_code_2(
    live: LiveServer, words: tuple[str, ...], said: str
) -> None:
    done = run(live, *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_a_refusal_is_json_where_json_was_asked_for(live: LiveServer) -> None:
    done = run(live, "submit", MODEL, "--bits", "4", "--group-size", "24", "--json")
    error = document(done)["error"]
    assert (done.returncode, error["status"]) == (2, 422)
    assert any("group_size" in entry["path"] for entry in error["errors"])
    done = run(live, "submit", MODEL, "--bits", "7", "--json")
    assert document(done)["error"]["errors"][0]["path"] == "bits"


def test_an_unreachable_server_and_a_wrong_key_are_code_3(live: LiveServer) -> None:
    away = run(live, "list", "--json", QUANTRY_URL="http://127.0.0.1:9")
    assert away.returncode == 3
    assert "quantry-server serve" in away.stderr
    assert document(away)["error"]["type"] == "ConnectionFailed"
    wrong = run(live, "list", QUANTRY_API_KEY="qz_wrong")
    assert wrong.returncode == 3
    assert "QUANTRY_API_KEY" in wrong.stderr
    assert "qz_wrong" not in wrong.stderr


def test_watch_gives_up_with_code_4(live: LiveServer) -> None:
    job = submit(live)
    done = run(live, "watch", job.id, "--timeout", "0.2")
    assert done.returncode == 4
    assert "still queued" in done.stderr


def interrupt(process: subprocess.Popen[str]) -> str:
    """Press Ctrl-C until the process ends, as one does; what it then wrote to stderr."""
    for _ in range(12):
        os.kill(process.pid, signal.SIGINT)
        try:
            return process.communicate(timeout=10)[1]
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    process.communicate()
    raise AssertionError("the process did not end on SIGINT")


def test_an_interrupt_leaves_the_job_running(live: LiveServer) -> None:
    job = submit(live)
    watching = start(live, "watch", job.id)
    assert watching.stderr is not None
    assert "queued" in watching.stderr.readline()
    rest = interrupt(watching)
    assert watching.returncode == 130
    assert f"quantry cancel {job.id}" in rest
    assert "Traceback" not in rest
    assert document(run(live, "list", "--json"))["items"][0]["state"] == "queued"
