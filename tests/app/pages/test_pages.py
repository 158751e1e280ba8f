"""The pages without JavaScript: what they show, what they accept, whom they let in."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import httpx2
import pytest

import app.pages
from app.security import create_key
from quantry.client import Client
from quantry.jobs import State
from tests.live_server import MODEL, LiveServer, request

STATIC = Path(app.pages.__file__).parent / "static"
FORM = {"model": MODEL, "bits": "4", "method": "gptq", "samples": "4", "sequence_length": "32"}
FILES = {"model.safetensors": b"weights", "config.json": b"{}"}


def finished_job(live: LiveServer) -> str:
    with Client(live.url, live.key) as client:
        job = client.submit(request())
    live.succeed(live.claim(job.id), FILES)
    return job.id


@pytest.mark.parametrize("path", ["/", "/jobs/job_00000000-0000-7000-8000-000000000000"])
def test_without_a_key_every_page_leads_to_the_login(visitor: httpx2.Client, path: str) -> None:
    answer = visitor.get(path)
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/login")
    assert visitor.get(answer.headers["location"]).status_code == 200


def test_the_cookie_is_out_of_reach_for_scripts_and_other_sites(
    live: LiveServer, visitor: httpx2.Client
) -> None:
    cookie = visitor.post("/login", data={"key": live.key}).headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie


def test_a_wrong_key_is_refused_and_not_repeated(visitor: httpx2.Client) -> None:
    answer = visitor.post("/login", data={"key": "qz_secret"})
    assert answer.status_code == 401
    assert "qz_secret" not in answer.text
    assert "set-cookie" not in answer.headers


def test_signing_out_ends_it(user: httpx2.Client) -> None:
    assert user.get("/").status_code == 200
    user.post("/logout")
    assert user.get("/").status_code == 303


@pytest.mark.parametrize(
    "wanted", ["//evil.example", "https://evil.example", "/\\evil.example", "evil", "/\r\nx: y"]
)
def test_the_login_never_leads_elsewhere(live: LiveServer, visitor: httpx2.Client, wanted: str) -> None:
    answer = visitor.post("/login", data={"key": live.key, "next": wanted})
    assert answer.headers["location"] == "/"


def test_the_login_leads_back(live: LiveServer, visitor: httpx2.Client) -> None:
    job = finished_job(live)
    login = visitor.get(f"/jobs/{job}").headers["location"]
    wanted = re.search(r'name="next" value="(.*?)"', visitor.get(login).text)
    assert wanted is not None
    assert (
        visitor.post("/login", data={"key": live.key, "next": wanted[1]}).headers["location"]
        == f"/jobs/{job}"
    )


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_forms_of_other_sites_are_refused(
    live: LiveServer, user: httpx2.Client, headers: dict[str, str]
) -> None:
    assert user.post("/", data=FORM, headers=headers).status_code == 403
    with Client(live.url, live.key) as client:
        assert list(client.jobs()) == []


def test_the_form_makes_the_job_that_it_says(live: LiveServer, user: httpx2.Client) -> None:
    fields = {
        **FORM,
        "correction": "bias_compensation",
        "group_size": "32",
        "symmetric": "false",
        "evaluation": "",
    }
    answer = user.post("/", data={**fields, "action": "submit"}, headers={"Origin": live.url})
    assert answer.status_code == 303
    with Client(live.url, live.key) as client:
        job = client.job(answer.headers["location"].rpartition("/")[2])
    weights = job.spec.weight_step
    assert (weights.bits, weights.group_size, weights.symmetric) == (4, 32, False)
    assert job.spec.compensation is not None
    assert job.spec.evaluation is None
    assert (job.spec.calibration.samples, job.spec.calibration.sequence_length) == (4, 32)


def test_a_double_click_is_one_job(live: LiveServer, user: httpx2.Client) -> None:
    token = re.search(r'name="token" value="(\w+)"', user.get("/").text)
    assert token is not None
    places = {user.post("/", data={**FORM, "token": token[1]}).headers["location"] for _ in range(2)}
    assert len(places) == 1


def test_a_dry_run_submits_nothing(live: LiveServer, user: httpx2.Client) -> None:
    answer = user.post("/", data={**FORM, "action": "estimate"})
    assert "6 quantized" in answer.text
    assert f'value="{MODEL}"' in answer.text
    with Client(live.url, live.key) as client:
        assert list(client.jobs()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": "7"}, "bits"),
        ({"group_size": "24"}, "group_size"),
        ({"model": "bundled/none"}, "model.id"),
        ({"samples": "x"}, "samples"),
    ],
)
def test_a_wrong_field_is_named_and_the_form_kept(
    user: httpx2.Client, change: dict[str, str], said: str
) -> None:
    answer = user.post("/", data={**FORM, "sequence_length": "48", **change})
    assert answer.status_code == 422
    assert said in answer.text
    assert 'value="48"' in answer.text


def test_a_finished_job_shows_quality_files_and_report(live: LiveServer, user: httpx2.Client) -> None:
    job = finished_job(live)
    text = user.get(f"/jobs/{job}").text
    for part in (
        "succeeded",
        "15.000",
        "+7.14 %",
        "model.safetensors",
        hashlib.sha256(b"weights").hexdigest()[:16],
    ):
        assert part in text
    assert "refresh" not in text
    report = user.get(f"/jobs/{job}/report")
    assert report.text.startswith("<!doctype html>")
    assert "sandbox" in report.headers["content-security-policy"]
    file = user.get(f"/jobs/{job}/files/model.safetensors", headers={"Range": "bytes=3-"})
    assert (file.status_code, file.content) == (206, b"ghts")
    assert user.get(f"/jobs/{job}/checkpoint").headers["content-type"] == "application/x-tar"


def test_a_running_job_reloads_and_can_be_cancelled(live: LiveServer, user: httpx2.Client) -> None:
    place = user.post("/", data=FORM).headers["location"]
    claim = live.claim(place.rpartition("/")[2])
    live.step(claim, State.QUANTIZING, "block 1 of 3", 1, 3)
    text = user.get(place).text
    assert "block 1 of 3" in text
    assert '<noscript><meta http-equiv="refresh"' in text
    assert '<progress max="3" value="1"' in text
    assert user.post(f"{place}/cancel").status_code == 303
    live.cancelled(claim)
    assert "cancelled" in user.get(place).text
    assert user.post(f"{place}/retry").status_code == 303
    assert "waiting for a worker" in user.get(place).text


def test_the_live_part_streams_until_the_end(live: LiveServer, user: httpx2.Client) -> None:
    place = user.post("/", data=FORM).headers["location"]
    claim = live.claim(place.rpartition("/")[2])
    with user.stream("GET", f"{place}/live") as stream:
        lines = stream.iter_lines()
        assert any("preparing" in line for line in lines)
        live.step(claim, State.QUANTIZING, "block 1 of 3", 1, 3)
        assert any("block 1 of 3" in line for line in lines)
        live.succeed(claim, FILES)
        rest = list(lines)
    assert any("succeeded" in line for line in rest)
    assert rest[-3:] == ["event: done", "data: done", ""]


def test_jobs_of_others_are_not_there(live: LiveServer, user: httpx2.Client) -> None:
    with Client(live.url, live.new_key("somebody else")) as client:
        job = client.submit(request())
    for path in ("", "/live", "/report", "/files/config.json", "/checkpoint"):
        answer = user.get(f"/jobs/{job.id}{path}")
        assert answer.status_code == 404
        assert "<h1>" in answer.text
    assert job.id not in user.get("/").text


def test_a_key_that_may_only_read_changes_nothing(live: LiveServer, visitor: httpx2.Client) -> None:
    with live.sessions() as session:
        key = create_key(session, owner="reader", name="test", scopes=["read"])[1]
    visitor.post("/login", data={"key": key})
    assert visitor.get("/").status_code == 200
    assert visitor.post("/", data=FORM).status_code == 403


def test_older_jobs_are_on_further_pages(live: LiveServer, user: httpx2.Client) -> None:
    with Client(live.url, live.key) as client:
        made = [client.submit(request()).id for _ in range(27)]
    first = user.get("/").text
    older = re.search(r'href="(/\?cursor=.*?)">Older', first)
    assert older is not None
    second = user.get(older[1]).text
    assert made[-1] in first
    assert made[0] in second
    assert made[0] not in first


def test_pages_are_kept_by_nobody_and_load_only_ours(user: httpx2.Client) -> None:
    answer = user.get("/")
    assert answer.headers["cache-control"] == "private, no-store"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for address in re.findall(r'(?:href|src)="(/static/.*?)"', answer.text):
        assert "immutable" in user.get(address).headers["cache-control"]
    assert "style=" not in answer.text


@pytest.mark.parametrize("name", ["LICENSE.htmx", "SHA256SUMS", "..%2froutes.py", "nothing.js"])
def test_only_styles_and_scripts_are_static(user: httpx2.Client, name: str) -> None:
    assert user.get(f"/static/{name}").status_code == 404


def test_vendored_scripts_are_what_was_released() -> None:
    for line in (STATIC / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((STATIC / name).read_bytes()).hexdigest() == digest


def test_names_of_a_job_are_text_never_markup(live: LiveServer, user: httpx2.Client) -> None:
    evil = "bundled/<img src=x onerror=alert(1)>"
    answer = user.post("/", data={**FORM, "model": evil})
    assert answer.status_code == 422
    assert "<img" not in answer.text
    assert "&lt;img" in answer.text
