"""Quantize one model with every side on the same windows, one after the other, and print one table.

usage: python benchmarks/peers/compare.py --calibration TEXT --evaluation TEXT [--bits 4 3] [--group-size 64]
           [--threads 2] [--sides gptqmodel llmcompressor quantry ...] [--model .bench/models/smollm2-135m]

Run benchmarks/prepare_smollm2.py and benchmarks/peers/setup.sh first, on an otherwise idle machine. Results
are kept under .bench/peers/results and not computed again; --fresh forgets them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from worker.prepare import multiplies_bfloat16

HERE = Path(__file__).resolve().parent
BENCH = HERE.parent.parent / ".bench"
SIDES: dict[str, tuple[str, str, list[str]]] = {  # name: (environment, script, options)
    "llmcompressor-rtn": ("llmcompressor", "run_llmcompressor.py", ["--method", "rtn"]),
    "llmcompressor": ("llmcompressor", "run_llmcompressor.py", []),
    "gptqmodel": ("gptqmodel", "run_gptqmodel.py", []),
    "autoround": ("autoround", "run_autoround.py", []),
    "quantry-plain": ("", "run_quantry.py", ["--recipe", "plain"]),
    "quantry": ("", "run_quantry.py", ["--recipe", "default"]),
    "quantry-compensated": ("", "run_quantry.py", ["--recipe", "compensated"]),
}
FLOAT32 = not multiplies_bfloat16(torch.device("cpu"))  # then nobody's forwards are in bfloat16
COLUMNS = ("perplexity", "cpu_s", "wall_s", "rss_before_mib", "rss_peak_mib", "rss_extra_mib")


def python(environment: str) -> str:
    """The interpreter of a peer; ours for the empty name. Exits if the peer was not set up."""
    if not environment:
        return sys.executable
    path = BENCH / "peers" / environment / "bin" / "python"
    if not path.exists():
        raise SystemExit(f"{path} is missing: run benchmarks/peers/setup.sh first")
    return str(path)


def call(command: list[str], threads: int, log: Path) -> None:
    """Run one step with everything it prints in `log`. Exits with the end of the log if it fails.

    Peers leave files where they are started: that is the log's folder.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "GPTQMODEL_CPU_WORKERS": str(max(2, threads)),  # it refuses to start with one
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        done = subprocess.run(
            command, cwd=log.parent, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{log.read_text(errors='replace')[-3000:]}\nsee {log}")


def measure(checkpoint: Path, windows: Path, threads: int, kept: Path) -> float:
    """Perplexity of a plain checkpoint, by our environment's script; `kept` remembers it."""
    if not kept.exists():
        log = kept.with_suffix(".log")
        command = [sys.executable, str(HERE / "perplexity.py"), str(checkpoint), str(windows)]
        call(command + ([] if FLOAT32 else ["--bfloat16"]), threads, log)
        kept.write_text(log.read_text().strip().splitlines()[-1] + "\n")
    return float(json.loads(kept.read_text())["perplexity"])


def side(name: str, bits: int, given: argparse.Namespace, windows: Path, results: Path) -> dict[str, Any]:
    """One row of the table: costs of the quantization and perplexity of its result."""
    environment, script, options = SIDES[name]
    target = results / f"{name}-w{bits}-g{given.group_size}"
    if not (target / "figures.json").exists():
        command = [python(environment), str(HERE / script), str(given.model), str(windows), str(target)]
        command += ["--bits", str(bits), "--group-size", str(given.group_size), *options]
        command += ["--float32"] if FLOAT32 and "llmcompressor" not in name else []  # which is float32 always
        call(command, given.threads, results / "logs" / f"{target.name}.log")
    figures = json.loads((target / "figures.json").read_text())
    figures["perplexity"] = round(measure(target, windows, given.threads, target / "perplexity.json"), 3)
    return {"side": name, **figures}


def show(rows: list[dict[str, Any]]) -> None:
    print("| side | bits | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (len(COLUMNS) + 2) + "|")
    for row in rows:
        print(f"| {row['peer']} | {row['bits']} | " + " | ".join(str(row[c]) for c in COLUMNS) + " |")


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--model", type=Path, default=BENCH / "models" / "smollm2-135m")
    options.add_argument("--calibration", type=Path, required=True, help="plain text")
    options.add_argument("--evaluation", type=Path, required=True, help="plain text")
    options.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    options.add_argument("--group-size", type=int, default=64, help="-1: one scale a row")
    options.add_argument("--samples", type=int, default=32)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--evaluation-length", type=int, default=1024)
    options.add_argument("--evaluation-windows", type=int, default=40, help="0: all")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--sides", nargs="+", choices=sorted(SIDES), default=list(SIDES))
    options.add_argument("--fresh", action="store_true", help="forget what was measured before")
    given = options.parse_args()
    for name in ("model", "calibration", "evaluation"):
        setattr(given, name, getattr(given, name).resolve())

    results = BENCH / "peers" / "results" / given.model.name
    if given.fresh:
        shutil.rmtree(results, ignore_errors=True)
    windows = results / "windows.safetensors"
    if not windows.exists():
        command = [
            sys.executable,
            str(HERE / "windows.py"),
            str(given.model),
            str(given.calibration),
            str(given.evaluation),
        ]
        command += [str(windows), "--samples", str(given.samples), "--length", str(given.length)]
        command += ["--evaluation-windows", str(given.evaluation_windows)]
        command += ["--evaluation-length", str(given.evaluation_length)]
        call(command, given.threads, results / "logs" / "windows.log")
    rows = [side(name, bits, given, windows, results) for bits in given.bits for name in given.sides]
    full = measure(given.model, windows, given.threads, results / "full-precision.json")
    print(
        f"{given.model.name}, {platform.machine()}, {given.threads} threads, "
        f"{'float32' if FLOAT32 else 'bfloat16'} products; full precision {full:.3f}"
    )
    show(rows)
    (results / "table.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
