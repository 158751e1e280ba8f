"""Show Quantry on an image classifier: a real server, a W4A4 job, and a checkpoint that classifies again.

usage: python scripts/demo_vision.py [--bits 4] [--method repq] [--keep FOLDER]

Starts `quantry-server serve` on a free port and an empty data folder, quantizes weights and activations of
`bundled/vit-tiny` on `bundled/digits`, with bias compensation, downloads the checkpoint, compares every digest, and
lets a separate process load it with `import quantry` and classify the test images once more. Ends with 0 only if
all of that worked and the accuracy is the report's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from demo import DemoError, Result, check_digests, run, server
from rich.console import Console
from rich.table import Table

from quantry.bundled import bundled_images
from quantry.client import Client, QuantryError
from quantry.reports import QualityRow
from quantry.wording import bytes_text, figure_text, metric_text

MODEL, IMAGES = "bundled/vit-tiny", "bundled/digits"
METHODS = ("uniform", "ptq4vit", "repq", "adalog", "igq")

USER = """
import json, sys, numpy, torch
import quantry
from transformers import AutoImageProcessor, AutoModelForImageClassification
folder, images = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(folder)
processor = AutoImageProcessor.from_pretrained(folder)
data = numpy.load(images)
pixels = processor(list(data["x_test"][..., None]), return_tensors="pt", input_data_format="channels_last")
with torch.no_grad():
    found = model(**pixels).logits.argmax(-1)
print(json.dumps({"top1": float((found == torch.from_numpy(data["y_test"]).long()).double().mean())}))
"""


def classify_again(folder: Path) -> float:
    """Top-1 accuracy on the test images, as a user of the checkpoint measures it. Raises DemoError."""
    command = [sys.executable, "-c", USER, str(folder), str(bundled_images(IMAGES))]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoError(f"transformers could not use the checkpoint:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["top1"])


def row_of(result: Result, metric: str) -> QualityRow:
    """One metric of a job's report. Raises DemoError if it is not there."""
    found = next((row for row in result.report.quality if row.metric == metric), None)
    if found is None or found.quantized is None:
        raise DemoError(f"{result.name}: the report has no {metric}")
    return found


def table(result: Result, bits: int) -> Table:
    """Full precision, round-to-nearest and the result side by side."""
    view = Table(title=f"{MODEL} on the test images of {IMAGES}", title_justify="left", title_style="bold")
    for heading in ("", "full precision", f"round to nearest, W{bits}A{bits}", result.name):
        view.add_column(heading, justify="left" if not heading else "right")
    for row in result.report.quality:
        values = (figure_text(row.metric, value) for value in (row.fp, row.rtn, row.quantized))
        view.add_row(metric_text(row.metric), *values)
    size = result.report.size
    view.add_row("size", bytes_text(size.fp_bytes), "", bytes_text(size.quantized_bytes))
    return view


def demonstrate(console: Console, bits: int, method: str, workspace: Path) -> None:
    """The whole show. Raises DemoError or QuantryError if any part of it fails."""
    begin = time.monotonic()
    with server(workspace / "server", workspace / "server.log") as url:
        console.print(f"server ready at {url} after {time.monotonic() - begin:.1f} s")
        with Client(url, (workspace / "server" / "api-key").read_text().strip()) as client:
            request: dict[str, Any] = {"model": MODEL, "bits": bits, "method": method}
            request["correction"] = "bias_compensation"
            result = run(client, console, f"{method} + compensation", request)
            artifact = workspace / "checkpoint"
            size = check_digests(artifact, client.download(result.job, artifact))
    console.print(f"downloaded {bytes_text(size)}; every sha256 is right; server stopped")
    again, reported = classify_again(artifact), row_of(result, "top1").quantized
    if again != reported:
        raise DemoError(
            f"the loaded checkpoint is right on {again:.4f} of the images, the report says {reported}"
        )
    console.print(f"a fresh process loads it and is right on {figure_text('top1', again)} of the test images")
    console.print(table(result, bits))
    console.print(f"All of it took {time.monotonic() - begin:.1f} s.")


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument(
        "--bits", type=int, default=4, choices=(3, 4, 6, 8), help="of weights and activations"
    )
    options.add_argument("--method", default="repq", choices=METHODS)
    options.add_argument("--keep", type=Path, help="work in this empty folder and leave it there")
    arguments = options.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="quantry-demo-") as scratch:
        workspace = (arguments.keep or Path(scratch)).absolute()
        workspace.mkdir(parents=True, exist_ok=True)
        try:
            demonstrate(console, arguments.bits, arguments.method, workspace)
        except (DemoError, QuantryError) as error:
            console.print(f"The demo failed: {error}", style="red", markup=False)
            log = workspace / "server.log"
            if log.exists():
                lines = log.read_text(errors="replace").splitlines(keepends=True)[-40:]
                console.print("The end of the server's log:\n" + "".join(lines), markup=False)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
