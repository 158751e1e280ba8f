"""What softmax bias correction is worth: perplexity of language models, and attention over long rows.

usage: python benchmarks/softmax_bias.py [--models MODEL ... --text STORIES] [--separator S] [--length 256]
           [--calibration-windows 16] [--evaluation-windows 40]
           [--classifier FOLDER --images IMAGES.npz] [--size 322] [--count 4] [--bits 8 6 4]
           [--ranges unit max]

Language models: only the softmax output is quantized. Calibration is the first nine tenths of the text, block by
block on what the blocks before it compute with their corrected softmax; evaluation is the rest. A range `max` is
per tensor or per head like the correction beside it; the first token of a causal model sees itself alone, with
probability 1, so that there `max` is `unit`. Classifier: `x_calib` gives beta, `x_test` the figures; at
322 pixels and patches of 14 a row has 530 keys.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate
from transformers import AutoImageProcessor, AutoModelForCausalLM

from quantry.contract import DatasetRef
from quantry.layers.operands import (
    attach,
    detach_all,
    set_probability_bias,
    use_quantized_attention,
    watch_probabilities,
)
from quantry.recipe import SoftmaxBiasStep
from worker.calibration.texts import calibration_windows, cut_windows, load_text, tokenize
from worker.methods.softmax_bias import SoftmaxResult, SoftmaxStatistics, correct_softmax, unit_grid
from worker.models.calls import run_block
from worker.models.causal_lm import CausalLM
from worker.models.vision import VisionModel
from worker.workspace import Workspace

CPU = torch.device("cpu")
BATCH = 8


def windows(options: argparse.Namespace, model: CausalLM) -> tuple[Tensor, Tensor]:
    """Calibration and evaluation windows, cut as a job cuts them."""
    nowhere, text = Path(), options.text.resolve()
    space = Workspace(artifact=nowhere, checkpoints=nowhere, cache=nowhere, model_roots=(text.parent,))
    tokens = []
    for role in ("calibration", "evaluation"):
        ref = DatasetRef(source="local", id=str(text), separator=options.separator)
        tokens.append(tokenize(load_text(ref, role, space), model.tokenizer(), model.start_token))
    calibration = calibration_windows(
        tokens[0], samples=options.calibration_windows, length=options.length, seed=0, name=text.name
    )
    return calibration, cut_windows(tokens[1], options.length)[: options.evaluation_windows or None]


@torch.no_grad()
def corrections(
    model: CausalLM, calibration: Tensor, step: SoftmaxBiasStep, *, corrected: bool
) -> Iterator[tuple[str, SoftmaxResult]]:
    """The result for every attention module, block by block; later blocks see the earlier ones quantized."""
    inner = model.family.groups[0][0].rpartition(".")[0]
    embedded = [model.embed(part) for part in torch.split(calibration, BATCH)]
    hidden, calls = [states for states, _ in embedded], [called for _, called in embedded]
    for index in range(len(model.blocks)):
        block = model.block(index)
        batches = [(states, called[index]) for states, called in zip(hidden, calls, strict=True)]
        result = correct_softmax(block, inner, batches, step)
        attach(block, f"{inner}.probabilities", result.quantizer)
        set_probability_bias(block, inner, result.bias if corrected else None)
        hidden = [run_block(block, states, call) for states, call in batches]
        yield f"{model.family.blocks}.{index}.{inner}", result


@torch.no_grad()
def perplexity(network: torch.nn.Module, tokens: Tensor) -> float:
    total = 0.0
    for part in torch.split(tokens, BATCH):
        logits = network(input_ids=part, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += float(cross_entropy(logits, part[:, 1:].flatten(), reduction="sum"))
    return float(np.exp(total / tokens[:, 1:].numel()))


def language_model(folder: Path, options: argparse.Namespace) -> None:
    model = CausalLM(folder, device=CPU, dtype=torch.float32)
    use_quantized_attention(model.model)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    use_quantized_attention(network)
    calibration, evaluation = windows(options, model)
    print(
        f"\n{folder.name}: perplexity {perplexity(network, evaluation):.4f} in full precision "
        f"({len(evaluation)} windows of {options.length})\n"
    )
    print("| bits | range | plain, tensor | plain, head | corrected, tensor | corrected, head | row sum |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for bits in options.bits:
        for range_ in options.ranges:
            cells, sums = [], []
            for corrected in (False, True):
                for granularity in ("tensor", "head"):
                    if (range_, granularity, corrected) == ("unit", "head", False):
                        cells.append("as tensor")
                        continue
                    given = {"bits": bits, "range": range_, "granularity": granularity}
                    step = SoftmaxBiasStep.model_validate(given)
                    for path, result in corrections(model, calibration, step, corrected=corrected):
                        attach(network, f"{path}.probabilities", result.quantizer)
                        set_probability_bias(network, path, result.bias if corrected else None)
                        sums.append(result.before.row_sum)
                    cells.append(f"{perplexity(network, evaluation):.4f}")
                    detach_all(network)
            print(
                f"| {bits} | {range_} | {' | '.join(cells)} | {min(sums):.3f}–{max(sums):.3f} |", flush=True
            )


def pixels(folder: Path, images: np.ndarray, size: int) -> Tensor:
    """uint8 images (N, H, W, 3) as the classifier wants them, at `size` pixels."""
    processor = AutoImageProcessor.from_pretrained(folder)
    values = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (processor.image_mean, processor.image_std))
    large = interpolate(values, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return (large - mean) / std


def classifier(options: argparse.Namespace) -> None:
    model = VisionModel(options.classifier, device=CPU)
    data = np.load(options.images)
    names = [operand.layers[0] for operand in model.operands if operand.kind == "probabilities"]
    seen = {
        part: {(name, bits): SoftmaxStatistics(unit_grid(bits)) for name in names for bits in options.bits}
        for part in ("x_calib", "x_test")
    }
    for part, found in seen.items():
        images = pixels(options.classifier, data[part][: options.count], options.size)
        for bits in options.bits:
            with ExitStack() as watching:
                for name in names:
                    watching.enter_context(watch_probabilities(model.network, name, found[name, bits].update))
                model.logits(images, batch=1)
    keys = (options.size // model.config.patch_size) ** 2 + 1
    print(f"\n{options.classifier.name}, {keys} keys, {options.count} images each, grid over [0, 1]:")
    print("plain, corrected per tensor, corrected per head\n")
    print("| bits | layer | row sum | tensor | head | SQNR, dB | tensor | head |")
    print("| --- " * 8 + "|")
    for bits in options.bits:
        rows = []
        for number, name in enumerate(names):
            fitted = seen["x_calib"][name, bits]
            biases = (None, fitted.bias("tensor"), fitted.bias("head"))
            errors = [seen["x_test"][name, bits].error(bias) for bias in biases]
            rows.append([*(e.row_sum for e in errors), *(e.sqnr_db for e in errors)])
            if bits == max(options.bits):
                print(f"| {bits} | {number} | " + " | ".join(_figures(rows[-1])) + " |")
        print(
            f"| {bits} | median | "
            + " | ".join(_figures([statistics.median(column) for column in zip(*rows, strict=True)]))
            + " |"
        )


def _figures(row: list[float]) -> list[str]:
    """Three row sums and three figures in dB."""
    return [f"{x:.3f}" if i < 3 else f"{x:.1f}" for i, x in enumerate(row)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=Path, nargs="*", default=[])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--separator", default="<|endoftext|>")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument("--evaluation-windows", type=int, default=40)
    parser.add_argument("--ranges", choices=("unit", "max"), nargs="+", default=["unit", "max"])
    parser.add_argument("--classifier", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--size", type=int, default=322)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    options = parser.parse_args()
    if options.models and not options.text:
        parser.error("--models needs --text")
    if options.classifier and not options.images:
        parser.error("--classifier needs --images")
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for folder in options.models:
        language_model(folder, options)
    if options.classifier:
        classifier(options)


if __name__ == "__main__":
    main()
