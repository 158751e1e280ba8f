"""What one quantization costs: processor time, wall time, memory. Runs in every peer's environment."""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path
from typing import Any, Self

MIB = 1024  # /proc counts in KiB


class Meter:
    """Measure the block: `with Meter() as meter: quantize()`, then `meter.figures()`.

    cpu_s is user plus system time of this process, all threads, and of children that ended in the block.
    Memory is the resident set of this process: before, and its high-water mark inside the block, for which
    Linux lets a process reset the mark (/proc/self/clear_refs, 5).
    """

    def __enter__(self) -> Self:
        Path("/proc/self/clear_refs").write_text("5")
        self.before_mib = _status("VmRSS") / MIB
        self._cpu, self._wall = _cpu_s(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu_s = _cpu_s() - self._cpu
        self.wall_s = time.perf_counter() - self._wall
        self.peak_mib = _status("VmHWM") / MIB

    def figures(self) -> dict[str, float]:
        return {
            "cpu_s": round(self.cpu_s, 2),
            "wall_s": round(self.wall_s, 2),
            "rss_before_mib": round(self.before_mib),
            "rss_peak_mib": round(self.peak_mib),
            "rss_extra_mib": round(self.peak_mib - self.before_mib),
        }


def _cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def options_of(doc: str | None) -> argparse.ArgumentParser:
    """What every side's script is called with; doc: the script's docstring."""
    options = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    for name in ("model", "windows", "target"):
        options.add_argument(name, type=Path)
    options.add_argument("--bits", type=int, required=True)
    options.add_argument("--group-size", type=int, required=True, help="-1: one scale a row")
    return options


def file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def write_figures(folder: Path, meter: Meter, **facts: Any) -> None:
    """figures.json beside the result: costs, and what a reader needs to repeat them."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    text = json.dumps(meter.figures() | {"threads": threads} | facts, indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.json").write_text(text + "\n")
    print(text)
