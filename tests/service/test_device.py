"""The device of a worker is decided in the open."""

from __future__ import annotations

import pytest

from worker.device import driver_devices, resolve
from worker.errors import DeviceError


def test_auto_is_the_cpu_without_a_driver() -> None:
    if driver_devices() == 0:
        assert resolve("auto") == "cpu"
    assert resolve("cpu") == "cpu"


@pytest.mark.gpu
def test_auto_is_cuda_with_one() -> None:
    assert resolve("auto") == resolve("cuda") == "cuda"


def test_cuda_is_never_replaced_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # torch then finds none, here and on a GPU host
    with pytest.raises(DeviceError, match="QUANTRY_DEVICE=cuda"):
        resolve("cuda")
