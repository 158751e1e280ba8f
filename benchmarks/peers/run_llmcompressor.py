"""Quantize with llm-compressor and write the weights back as plain numbers.

usage: .bench/peers/llmcompressor/bin/python run_llmcompressor.py MODEL WINDOWS.safetensors TARGET
           --bits 4 --group-size 64 [--method rtn]

Defaults of the library but for what the comparison fixes (bits, group size, symmetric, static order,
calibration windows). After its calibration the library holds the rounded weights as plain numbers; they go
to TARGET. TARGET/packed is what it saves. Loading and saving are not measured.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from meter import Meter, file_bytes, options_of, write_figures
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--method", choices=("gptq", "rtn"), default="gptq")
    given = options.parse_args()

    rows = load_file(given.windows)["calibration"]
    samples = Dataset.from_dict(
        {"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}
    )
    grouped = given.group_size != -1
    weights = QuantizationArgs(
        num_bits=given.bits,
        group_size=given.group_size if grouped else None,
        strategy="group" if grouped else "channel",
        symmetric=True,
        actorder="static" if given.method == "gptq" else None,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    modifier = GPTQModifier if given.method == "gptq" else QuantizationModifier
    recipe = [modifier(config_groups=groups, ignore=["lm_head"])]

    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    with Meter() as meter:
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(given.model),
            dataset=samples,
            recipe=recipe,
            max_seq_length=rows.shape[1],
            num_calibration_samples=len(rows),
            batch_size=1,
        )
    plain = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    layers = 0
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "weight_scale"):
                rounded = module.weight if given.method == "gptq" else nearest(module, weights)
                plain.get_submodule(name).weight.copy_(rounded)
                layers += 1
    shutil.rmtree(given.target, ignore_errors=True)
    plain.save_pretrained(given.target)
    packed = given.target / "packed"
    model.save_pretrained(packed, save_compressed=True)
    write_figures(
        given.target,
        meter,
        peer=f"llm-compressor {version('llmcompressor')}",
        torch=torch.__version__,
        method=given.method,
        bits=given.bits,
        group_size=given.group_size,
        layers=layers,
        file_bytes=file_bytes(packed),
    )


def nearest(module: torch.nn.Module, args: QuantizationArgs) -> torch.Tensor:
    """The weight on the grid that the library's observer found."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    return fake_quantize(module.weight, module.weight_scale, module.weight_zero_point, args)


if __name__ == "__main__":
    main()
