"""How a block is called: shared by every adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class BlockCall:
    """What the model passes to one block beside the hidden states: masks, positions, rotary tables."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def run_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """The block's output hidden states, whatever else it returns."""
    out = block(hidden, *call.args, **call.kwargs)
    states: Tensor = out[0] if isinstance(out, tuple) else out
    return states
