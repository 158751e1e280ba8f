"""README.md of an artifact: what it is, how it was made, how good it is, how to load it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import quantry
from quantry.diffusion import SIDECAR
from quantry.recipe import BiasCompensationStep, Step, WeightStep
from quantry.reports import QualityRow, SizeReport
from quantry.wording import METHODS, figure_text, method_of, metric_text, recipe_text, samples_text
from worker.export.files import whole_or_nothing, write_bytes
from worker.export.manifest import is_classifier, loader_of

_PIPELINE = (
    "`quantry.load` puts the packed weights and the quantizers of each step into the pipeline. It refuses another "
    "number of steps and another scheduler: what is calibrated holds for these alone."
)
_NOTES = {
    "compressed-tensors": "Reads with stock transformers and vLLM; nothing of Quantry is needed.",
    "gptq": (
        "transformers needs the packages `optimum` and `gptqmodel` to read this layout; "
        "`quantry.load(folder)` reads it with neither, as dense weights."
    ),
    "gguf": (
        "llama.cpp honours the biases that correction may have added. transformers' `gguf_file=` drops "
        "biases without a word; `quantry.load(folder)` keeps them, as dense weights."
    ),
    "onnx": (
        "`pixels` is what the image processor of this folder makes of images: float32 (batch, C, H, W). Where 4-bit "
        "weights meet inputs without a grid, ONNX Runtime rounds those to 8 bits unless the session is told "
        "`session.qdq_matmulnbits_accuracy_level = 1`."
    ),
    "quantry": (
        "`import quantry` must come before `from_pretrained`: without it transformers only warns and loads "
        "random weights. `quantry.load(folder)` is the safe way."
    ),
}


def write_model_card(
    folder: Path,
    *,
    format: str,
    base_model: str,
    recipe: Sequence[Step],
    source: Path | None = None,
    quality: Sequence[QualityRow] = (),
    size: SizeReport | None = None,
    warnings: Sequence[str] = (),
) -> None:
    """Write README.md; call it again with the figures once there are some.

    source: the full-precision checkpoint, whose licence is carried over. Raises DiskFull.
    """
    loader = loader_of(folder, format)
    is_pipeline = (folder / SIDECAR).is_file()
    parts = [
        _front_matter(base_model, format, source, _task(folder)),
        f"# {base_model}, quantized\n",
        f"Made by Quantry {quantry.__version__} from `{base_model}`.\n",
        "## How it was made\n",
        "".join(f"{number}. {_step(step)}\n" for number, step in enumerate(recipe, 1))
        or "See `config.json`.\n",
        _figures(quality, size),
        "## Load it\n",
        f'```sh\npip install "{loader.package}{loader.version}"{"" if is_pipeline else " transformers"}\n```\n',
        f"```python\n{loader.snippet}\n```\n",
        f"{_PIPELINE if is_pipeline else _NOTES[format]}\n",
        "".join(f"- {warning}\n" for warning in warnings),
        "`manifest.json` has the sha256 of every file, `report.json` the measurements.\n",
    ]
    with whole_or_nothing(folder):
        write_bytes(folder / "README.md", "\n".join(part for part in parts if part).encode())


def _front_matter(base_model: str, format: str, source: Path | None, task: tuple[str, str]) -> str:
    library, tag = task
    lines = [
        f"library_name: {library}",
        f"pipeline_tag: {tag}",
        f"tags: [{', '.join(dict.fromkeys(('quantized', format, 'quantry')))}]",
    ]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) and not base_model.startswith("bundled/"):
        lines += [f"base_model: {base_model}", "base_model_relation: quantized"]
    readme = source / "README.md" if source else None
    if readme is not None and readme.is_file():
        head = readme.read_text(errors="replace").partition("\n---")[0]
        # a relative link names a file that only the source has
        lines += re.findall(r"^license(?:_name)?: .+$|^license_link: https?://.+$", head, flags=re.MULTILINE)
    return "---\n" + "\n".join(lines) + "\n---\n"


def _task(folder: Path) -> tuple[str, str]:
    """The library that the model belongs to, and what it does, in the words of model cards."""
    if (folder / SIDECAR).is_file():
        return "diffusers", "unconditional-image-generation"
    return "transformers", "image-classification" if is_classifier(folder) else "text-generation"


def _step(step: Step) -> str:
    """One step of the recipe in words."""
    if isinstance(step, BiasCompensationStep):
        where = "channel" if step.granularity == "channel" else "position and channel"
        return f"Bias compensation per {where} ({METHODS[step.method].citation}), {step.targets} targets"
    if not isinstance(step, WeightStep):
        words, cited = recipe_text([step]), method_of(step).citation
        return words[:1].upper() + words[1:] + (f" ({cited})" if cited else "")
    grid = f"{step.bits} bits, {'symmetric' if step.symmetric else 'asymmetric'}, "
    grid += f"groups of {step.group_size}" if step.group_size else "per channel"
    known = METHODS[step.method]
    title = "Round to nearest" if step.method == "rtn" else f"{known.name} ({known.citation})"
    return f"{title}: {grid}, clipping {step.clip}"


def _figures(quality: Sequence[QualityRow], size: SizeReport | None) -> str:
    """The measured quality and size, or nothing."""
    if not quality and size is None:
        return ""
    text = "## Measured\n\n"
    if quality:
        text += "| metric | data | full precision | round to nearest | this checkpoint |\n"
        text += "| --- | --- | --- | --- | --- |\n"
        for row in quality:
            values = " | ".join(figure_text(row.metric, value) for value in (row.fp, row.rtn, row.quantized))
            measured = f"{row.dataset}, {samples_text(row.metric, row.samples)}"
            text += f"| {metric_text(row.metric)} | {measured} | {values} |\n"
    if size is not None:
        text += (
            f"\n{size.effective_bits:.2f} bits per quantized weight, with scales, zero-points and added "
            f"biases; {size.quantized_bytes} bytes instead of {size.fp_bytes}.\n"
        )
    return text
