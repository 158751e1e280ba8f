"""The entry points that the README and continuous integration name exist and mean what they say."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def plan(target: str) -> str:
    """The commands that `make TARGET` would run."""
    return subprocess.run(
        ["make", "--dry-run", "--always-make", "--no-print-directory", target],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("demo", "scripts/demo.py"),
        ("serve", "quantry-server serve --data data"),
        ("bench", "benchmarks/api.py"),
        ("chaos", 'pytest -m "slow and not gpu"'),
        ("test-gpu", "pytest -m gpu"),
    ],
)
def test_target_runs_its_command_in_the_environment(target: str, command: str) -> None:
    commands = plan(target)
    assert command in commands
    assert "pip install --quiet -c constraints.txt -e '.[dev]'" in commands


def test_test_runs_every_check_and_then_pytest() -> None:
    commands = plan("test")
    checks = ["ruff format --check", "ruff check", "mypy", "lint-imports", "pytest -m"]
    positions = [commands.index(f".venv/bin/{check}") for check in checks]
    assert positions == sorted(positions)


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert script.read_text().rstrip().endswith("exec make test")
