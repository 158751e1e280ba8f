"""`make demo-vision`: a classifier through a real server, and the downloaded checkpoint classifies as reported."""

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "demo_vision.py"


def test_demo_ends_well(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--method", "uniform", "--bits", "6", "--keep", tmp_path]
    wide = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(command, env=wide, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every sha256 is right" in done.stdout
    again = re.search(r"is right on (\d+\.\d\d %) of the test images", done.stdout)
    row = next(line for line in done.stdout.splitlines() if "top-1 accuracy" in line)
    figures = re.findall(r"\d+\.\d\d %", row)
    assert len(figures) == 3  # full precision, round to nearest, the result
    assert again is not None
    assert again[1] == figures[2]
