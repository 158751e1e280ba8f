"""Quantize with AutoRound and write the weights back as plain numbers.

usage: .bench/peers/autoround/bin/python run_autoround.py MODEL WINDOWS.safetensors TARGET
           --bits 4 --group-size 64 [--iterations 50] [--float32]

Defaults of the library but for what the comparison fixes (bits, group size, symmetric, calibration windows) and the
iterations a block: 200 are its default, 50 its `light` recipe. TARGET is a float32 checkpoint with the rounded weights.
Loading and saving are not measured.
"""

from __future__ import annotations

import shutil

import auto_round
import torch
from auto_round import AutoRound
from meter import Meter, options_of, write_figures
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--iterations", type=int, default=50, help="of each block")
    options.add_argument("--float32", action="store_true", help="a float32 model without autocast")
    given = options.parse_args()

    rows = load_file(given.windows)["calibration"]
    dtype = torch.float32 if given.float32 else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype)
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(given.model),
        bits=given.bits,
        group_size=given.group_size,
        sym=True,
        iters=given.iterations,
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows],
        nsamples=len(rows),
        seqlen=rows.shape[1],
        device_map="cpu",
        amp=not given.float32,
    )
    with Meter() as meter:
        rounded, layers = rounding.quantize()
    shutil.rmtree(given.target, ignore_errors=True)
    rounded.float().save_pretrained(given.target)
    write_figures(
        given.target,
        meter,
        peer=f"AutoRound {auto_round.__version__}, {given.iterations} iterations",
        torch=torch.__version__,
        bits=given.bits,
        group_size=given.group_size,
        layers=len(layers),
    )


if __name__ == "__main__":
    main()
