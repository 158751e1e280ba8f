"""Perplexity of a plain checkpoint on the shared evaluation windows; see docs/perplexity.md.

usage: python benchmarks/peers/perplexity.py CHECKPOINT WINDOWS.safetensors

The same script for every side: float32 weights, float32 log-softmax. `--bfloat16` computes the products in
bfloat16 where the processor is four times faster at it (agrees to four digits on SmolLM2-135M).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor, *, bfloat16: bool) -> float:
    """exp of the mean negative log-likelihood of all tokens but the first of each (windows, length) row."""
    total = 0.0
    for row in windows:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            logits = model(row[None], use_cache=False).logits[0, :-1]
        log_p = logits.float().log_softmax(-1)
        total -= log_p.gather(1, row[1:, None]).double().sum().item()
    return math.exp(total / (len(windows) * (windows.shape[1] - 1)))


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("checkpoint", type=Path)
    options.add_argument("windows", type=Path)
    options.add_argument("--bfloat16", action="store_true")
    given = options.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.checkpoint, dtype=torch.float32)
    windows = load_file(given.windows)["evaluation"]
    value = perplexity(model, windows, bfloat16=given.bfloat16)
    print(json.dumps({"perplexity": value, "windows": len(windows), "length": windows.shape[1]}))


if __name__ == "__main__":
    main()
