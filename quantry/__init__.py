"""Quantry: quantize, correct and verify a model over HTTP, and load what comes back.

`import quantry` is cheap: it imports neither torch nor transformers. It makes sure that transformers,
imported before or after, knows checkpoints in the `quantry` format, so that
`AutoModelForCausalLM.from_pretrained(folder)` loads them. `quantry.load(folder)` loads every format that
Quantry writes, and refuses what would load wrongly.
"""

from __future__ import annotations

import importlib
from typing import Any

from quantry._register import register_with_transformers

__version__ = "0.1.0"
_LAZY = {"load": "quantry.checkpoint"}

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'quantry' has no attribute {name!r}")
