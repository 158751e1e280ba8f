"""What the benchmarks measured before: benchmarks/results/NAME.jsonl, a line for each run, kept with the project.

A run is known by its settings; the version of the code, the processor and torch stand beside its figures. To take a
run again, delete its line.
"""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


class Kept:
    """The runs of one benchmark."""

    def __init__(self, name: str) -> None:
        self.file = HERE / "results" / f"{name}.jsonl"

    def find(self, run: dict[str, Any]) -> dict[str, Any] | None:
        """The figures of the last run with these settings."""
        if not self.file.exists():
            return None
        lines = [json.loads(line) for line in self.file.read_text().splitlines()]
        found = [line["figures"] for line in lines if line["run"] == run]
        return found[-1] if found else None

    def keep(self, run: dict[str, Any], figures: dict[str, Any]) -> None:
        """Append the figures of a run; lines are short, so that benchmarks beside each other do not mix them."""
        self.file.parent.mkdir(exist_ok=True)
        line = {"run": run, "figures": figures, **circumstances()}
        with self.file.open("a") as out:
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


def circumstances() -> dict[str, str]:
    """The last change of the code that is measured, processor and torch."""
    code = ["--", "quantry", "worker"]
    version = git("log", "-1", "--format=%h", *code).stdout.strip()
    changed = "+" if git("diff", "--quiet", "HEAD", *code).returncode else ""
    return {"version": version + changed, "processor": processor(), "torch": torch.__version__}


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True)


def processor() -> str:
    """The widest instructions for products that the processor has, where the system lists them."""
    listed = Path("/proc/cpuinfo")
    flags = set(listed.read_text().split()) if listed.exists() else set()
    known = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags]
    return " ".join([platform.machine(), *known[:1]])
