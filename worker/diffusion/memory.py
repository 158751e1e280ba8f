"""What happens when a GPU runs out of memory: the same work once more in batches half as large, then a typed error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from worker.errors import OutOfMemory

Result = TypeVar("Result")


def halving(work: Callable[[int], Result], batch: int, what: str, warn: Callable[[str], None]) -> Result:
    """`work(batch)`, and where that does not fit, `work(batch // 2)`: once. `work` must begin anew each time.

    Args: what: the work and the field that sets its batch, for messages. warn: hears that batches were halved.
    Raises: OutOfMemory.
    """
    try:
        return work(batch)
    except torch.OutOfMemoryError as error:
        first = error
    del first  # its traceback holds the tensors that filled the memory
    half = batch // 2
    if half == 0:
        raise OutOfMemory(f"{what}: one sample at a time does not fit the device; use a larger one")
    torch.cuda.empty_cache()
    warn(f"{what}: {batch} at a time did not fit the device, {half} were tried")
    try:
        return work(half)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"{what}: neither {batch} nor {half} at a time fit the device; ask for fewer or use a larger one"
        ) from error
