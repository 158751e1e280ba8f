"""docker-compose.yml: valid by the Compose schema, and its commands run by hand against real servers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from app import broker
from app.shared.settings import Settings

ROOT = Path(__file__).parents[2]
WAIT_S = 60


@pytest.fixture(scope="module")
def compose() -> Any:
    """The file with its variables filled in, as `docker compose config` would."""
    given = {"POSTGRES_PASSWORD": "secret"}

    def fill(match: re.Match[str]) -> str:
        name, _, default = match[1].partition(":")
        return given.get(name, default.removeprefix("-"))

    text = (ROOT / "docker-compose.yml").read_text()
    return yaml.safe_load(re.sub(r"\$\{([^}]*)\}", fill, text))


def test_it_is_valid_compose(compose: Any) -> None:
    schema = json.loads((Path(__file__).parent / "schemas" / "compose-spec.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(compose)
    broken = json.loads(json.dumps(compose))
    broken["services"]["api"]["healthcheck"]["intervall"] = "1s"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(broken)


def test_services_are_complete_and_refer_to_what_exists(compose: Any) -> None:
    services = compose["services"]
    assert set(services) == {"postgres", "valkey", "migrate", "api", "worker"}
    for name, service in services.items():
        assert name == "migrate" or "healthcheck" in service
        for needed in service.get("depends_on", {}):
            assert needed in services
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in compose["volumes"]
        target = service.get("build", {}).get("target")
        if target is not None:
            assert f" AS {target}\n" in (ROOT / "Dockerfile").read_text()
    devices = services["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]


@pytest.mark.parametrize("name", ["migrate", "api", "worker"])
def test_every_variable_is_a_setting(compose: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = compose["services"][name]["environment"]
    known = {f"QUANTRY_{field.upper()}" for field in Settings.model_fields}
    assert set(environment) <= known
    for variable, value in environment.items():
        monkeypatch.setenv(variable, str(value))
    settings = Settings()
    assert settings.database.startswith("postgresql+psycopg://quantry:secret@postgres")
    assert settings.redis_url == "redis://valkey:6379/0"


class Services:
    """The commands of the file, run by hand: hosts, port and device are those of this machine."""

    def __init__(self, compose: Any, database_url: str, redis_url: str, data: Path) -> None:
        self.compose = compose
        self.replaced = {
            "QUANTRY_DATABASE_URL": database_url,
            "QUANTRY_REDIS_URL": redis_url,
            "QUANTRY_DATA": str(data),
            "QUANTRY_DEVICE": "cpu",
        }
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = str(free.getsockname()[1])

    def environment(self, name: str) -> dict[str, str]:
        declared = {key: str(value) for key, value in self.compose["services"][name]["environment"].items()}
        own = {key: value for key, value in self.replaced.items() if key in declared}
        stand_in = {"QUANTRY_JOB_MODULE": "child_jobs", "PYTHONPATH": str(Path(__file__).parent)}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("QUANTRY_")}
        return {**inherited, **declared, **own, **stand_in}

    def here(self, command: list[str]) -> list[str]:
        """The same command in this environment's programs, on a free port of loopback."""
        command = [part.replace("8000", self.port).replace("0.0.0.0", "127.0.0.1") for part in command]
        programs = {"quantry-server": [sys.executable, "-m", "app"], "python": [sys.executable]}
        return [*programs[command[0]], *command[1:]]

    def run(self, name: str, command: list[str] | None = None) -> str:
        command = command or self.compose["services"][name]["command"]
        return subprocess.run(
            self.here(command),
            env=self.environment(name),
            check=True,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        ).stdout

    def is_healthy(self, name: str) -> bool:
        kind, *command = self.compose["services"][name]["healthcheck"]["test"]
        assert kind == "CMD"
        run = subprocess.run(self.here(command), env=self.environment(name), capture_output=True, check=False)
        return run.returncode == 0

    @contextmanager
    def started(self, name: str) -> Iterator[None]:
        command = self.here(self.compose["services"][name]["command"])
        process = subprocess.Popen(command, env=self.environment(name), stderr=subprocess.DEVNULL)
        try:
            yield
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) in (0, -signal.SIGTERM)
        finally:
            process.kill()
            process.wait()

    def call(self, key: str, method: str, path: str, body: object = None) -> Any:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return json.load(answer)


def test_its_commands_work_on_postgres(compose: Any, postgres_url: str, tmp_path: Path) -> None:
    path = broker.socket_path(tmp_path)
    with ExitStack() as stack:
        child = broker.start(tmp_path / "broker", path)
        stack.callback(child.kill)
        services = Services(compose, postgres_url, f"unix://{path}", tmp_path / "data")
        services.run("migrate")
        key = services.run("api", ["quantry-server", "keys", "create", "me"]).strip()
        stack.enter_context(services.started("api"))
        stack.enter_context(services.started("worker"))
        await_true(lambda: services.is_healthy("api"))
        assert services.is_healthy("worker")

        body = {"model": "bundled/opt-tiny", "bits": 4, "labels": {"behave": "succeed"}}
        job_id = services.call(key, "POST", "/v1/jobs", body)["id"]
        await_true(lambda: services.call(key, "GET", f"/v1/jobs/{job_id}")["state"] == "succeeded")


def await_true(what: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            if what():
                return
        except urllib.error.URLError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.2)
