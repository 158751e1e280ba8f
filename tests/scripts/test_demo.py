"""`make demo`: the whole way of a job with real processes, and what the demo says when something is off."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from quantry.reports import FileEntry, Loader, Manifest

SCRIPT = Path(__file__).parents[2] / "scripts" / "demo.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_demo_ends_well_and_leaves_nothing_running(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--windows", "12", "--keep", tmp_path]
    wide = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(command, env=wide, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("every sha256 is right", "stock transformers loads it", "GPTQ-3 + compensation"):
        assert words in done.stdout
    figures = [float(value) for value in re.findall(r"│ +(\d+\.\d{3}) │", done.stdout)]
    assert len(figures) == 4  # full precision, RTN, GPTQ, GPTQ + compensation
    assert figures[0] == min(figures)
    assert figures[2] < figures[1]
    assert ("holds" in done.stdout) == (figures[1] > figures[2] > figures[3])
    assert not processes_using(tmp_path)


def processes_using(folder: Path) -> list[str]:
    """Command lines of the processes that were started with this data folder in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "environ").read_bytes() and process.name != str(
                os.getpid()
            ):
                found.append((process / "cmdline").read_text())
        except (OSError, PermissionError):
            continue
    return found


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((3.0, 2.0, 1.0), "The order A > B > C holds"),
        ((3.0, 2.0, 2.5), r"C (2.500) is not better than B (2.000)"),
    ],
)
def test_verdict_is_what_was_measured(
    demo: ModuleType, values: tuple[float, float, float], words: str
) -> None:
    assert words in re.sub(r"\[.*?\]", "", demo.verdict(list(zip("ABC", values, strict=True))))


def test_a_changed_file_is_noticed(demo: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("changed")
    entry = FileEntry(path="a", bytes=7, sha256="0" * 64)
    loader = Loader(package="transformers", version="5", snippet="")
    manifest = Manifest(job=None, format="compressed-tensors", loader=loader, files=(entry,))
    with pytest.raises(demo.DemoError, match="a does not have the sha256 of the manifest"):
        demo.check_digests(tmp_path, manifest)


def test_a_server_that_cannot_start_is_reported(demo: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with (
        pytest.raises(demo.DemoError, match="the server ended with code"),
        demo.server(tmp_path / "file", tmp_path / "log"),
    ):
        pytest.fail("the server claims to be ready")
