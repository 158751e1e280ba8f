"""Quantize with GPTQModel and write the weights back as plain numbers.

usage: .bench/peers/gptqmodel/bin/python run_gptqmodel.py MODEL WINDOWS.safetensors TARGET
           --bits 4 --group-size 64 [--float32]

Defaults of the library but for what the comparison fixes (bits, group size, symmetric, calibration windows);
its own static order (`act_group_aware`) is on by default. TARGET/packed is what the library saves,
TARGET itself a float32 checkpoint with the same weights. Loading and saving are not measured.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import gptqmodel
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from meter import Meter, file_bytes, options_of, write_figures
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def unpacked(folder: Path) -> dict[str, torch.Tensor]:
    """Layer name -> dequantized weight, (out, in) float32, as the library's own kernel computes it.

    That kernel takes float16, in which the scales are stored, or bfloat16.
    """
    model = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    weights = {}
    for name, module in model.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            weights[name] = module.dequantize_weight().float().T.contiguous()
    return weights


def main() -> None:
    options = options_of(__doc__)
    options.add_argument(
        "--float32", action="store_true", help="forwards in float32, not as the library chooses"
    )
    given = options.parse_args()

    rows = load_file(given.windows)["calibration"]
    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows]
    config = QuantizeConfig(bits=given.bits, group_size=given.group_size, sym=True)
    model = GPTQModel.load(str(given.model), config, **({"dtype": torch.float32} if given.float32 else {}))
    with Meter() as meter:
        model.quantize(samples, batch_size=1)
    shutil.rmtree(given.target, ignore_errors=True)
    packed = given.target / "packed"
    model.save(str(packed))

    plain = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    weights = unpacked(packed)
    with torch.no_grad():
        for name, weight in weights.items():
            plain.get_submodule(name).weight.copy_(weight)
    plain.save_pretrained(given.target)
    write_figures(
        given.target,
        meter,
        peer=f"GPTQModel {gptqmodel.__version__}",
        torch=torch.__version__,
        bits=given.bits,
        group_size=given.group_size,
        layers=len(weights),
        file_bytes=file_bytes(packed),
    )


if __name__ == "__main__":
    main()
