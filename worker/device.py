"""What this worker computes on, decided once when it starts."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Literal

from worker.errors import DeviceError

_PROBE = "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')"


def resolve(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """The device that `wanted` means here. Raises DeviceError if cuda is wanted and torch cannot use it.

    torch is asked in a process of its own, because the worker itself stays small; and only where the driver
    knows a GPU.
    """
    if wanted == "cpu" or (wanted == "auto" and driver_devices() == 0):
        return "cpu"
    run = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)
    if run.stdout.strip() == "cuda":
        return "cuda"
    if wanted == "auto":
        return "cpu"
    reason = (
        run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "torch.cuda.is_available() is false"
    )
    raise DeviceError(f"QUANTRY_DEVICE=cuda, but torch finds no GPU here: {reason}")


def driver_devices() -> int:
    """How many GPUs the CUDA driver shows to this process; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
