"""Quantize with Quantry on the windows of the comparison and write the weights back as plain numbers.

usage: python benchmarks/peers/run_quantry.py MODEL WINDOWS.safetensors TARGET --bits 4 --group-size 64
           [--recipe plain|default|compensated] [--float32]

plain is GPTQ as published (no clip search, no asymmetric target, no refinement; static order), default is
what a job does, compensated adds bias compensation, for which the written checkpoint gets bias slots. The
sweep reads the model block by block, so reading is part of what is measured.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import torch
from meter import Meter, options_of, write_figures
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import quantry
from quantry.contract import JobSpec, ModelRef
from quantry.recipe import BiasCompensationStep, GptqStep, Step
from worker.calibration.store import BlockStore
from worker.metrics.quality import PerplexityJudge
from worker.models.causal_lm import CausalLM
from worker.progress import Progress
from worker.sweep import BlockSweep


def recipe(name: str, bits: int, group_size: int) -> tuple[Step, ...]:
    """The steps of one of the three recipes; a group size of -1 is one scale a row."""
    groups = None if group_size == -1 else group_size
    if name == "plain":
        return (
            GptqStep.model_validate(
                {"bits": bits, "group_size": groups, "clip": "none", "target": "plain", "refinement": 0}
            ),
        )
    step = GptqStep.model_validate({"bits": bits, "group_size": groups})
    return (step, BiasCompensationStep()) if name == "compensated" else (step,)


def write_plain(source: Path, target: Path, store: BlockStore, model: CausalLM) -> int:
    """A float32 checkpoint with the quantized weights; returns the number of layers and their bits."""
    layers = dict(store.layers(model))
    config = AutoConfig.from_pretrained(source)
    if any(layer.added_bias for layer in layers.values()):
        config.attention_bias = config.mlp_bias = True  # slots for what compensation adds (Llama)
    plain = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.float32)
    with torch.no_grad():
        for name, layer in layers.items():
            module = plain.get_submodule(name)
            module.weight.copy_(layer.weight.dequantize())
            if module.bias is not None:
                module.bias.zero_() if layer.bias is None else module.bias.copy_(layer.bias)
    plain.save_pretrained(target)
    return sum(layer.weight.storage_bits() for layer in layers.values())


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--recipe", choices=("plain", "default", "compensated"), default="default")
    options.add_argument("--float32", action="store_true", help="forwards in float32 instead of bfloat16")
    given = options.parse_args()

    steps = recipe(given.recipe, given.bits, given.group_size)
    spec = JobSpec(model=ModelRef(source="local", id=str(given.model)), recipe=steps, evaluation=None)
    dtype = torch.float32 if given.float32 else torch.bfloat16
    model = CausalLM(given.model, device=torch.device("cpu"), dtype=dtype)
    rows = load_file(given.windows)["calibration"]
    with tempfile.TemporaryDirectory() as folder:
        store = BlockStore(Path(folder), "benchmark")
        judge = PerplexityJudge(model)
        sweep = BlockSweep(model, spec, store, Progress(io.StringIO()), rows, None, judge)
        with Meter() as meter:
            sweep.run()
        bits = write_plain(given.model, given.target, store, model)
    write_figures(
        given.target,
        meter,
        peer=f"Quantry {quantry.__version__} ({given.recipe})",
        torch=torch.__version__,
        bits=given.bits,
        group_size=given.group_size,
        dtype=str(dtype),
        weight_bytes=bits // 8,
    )


if __name__ == "__main__":
    main()
