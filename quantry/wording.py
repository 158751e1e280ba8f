"""How numbers and recipes are said to people: in the terminal, on the pages, in the report. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from quantry.contract import DatasetRead, JobSpec
from quantry.recipe import (
    AccuquantStep,
    ActivationGrid,
    BiasCompensationStep,
    IgqStep,
    NoiseCorrectionStep,
    RepqStep,
    SmoothquantStep,
    SoftmaxBiasStep,
    Step,
    TrainingStep,
    UniformStep,
    WeightStep,
)
from quantry.reports import BitOperations

_BYTES = ("B", "kB", "MB", "GB", "TB")
_COUNTS = ("", "k", "M", "G", "T", "P")
_ACCURACIES = {"top1": "top-1 accuracy", "top5": "top-5 accuracy"}
_METRICS = {
    **_ACCURACIES,
    "kl": "KL divergence, nats",
    "latent_mse": "squared error of the final latent",
    "psnr": "PSNR to full precision, dB",
    "ssim": "SSIM to full precision",
    "lpips": "LPIPS to full precision",
    "frechet": "Frechet distance to full precision's samples",
    "frechet_inception": "the same in Inception's features",
}
_HIGHER = (*_ACCURACIES, "psnr", "ssim")
_SAMPLED = ("latent_mse", "psnr", "ssim", "lpips", "frechet", "frechet_inception")


@dataclass(frozen=True)
class MethodName:
    """What a method is called, who published it, and its number on arXiv."""

    name: str
    authors: str = ""
    arxiv: str = ""

    @property
    def citation(self) -> str:
        """`Frantar et al. 2022, arXiv:2210.17323`; nothing for what nobody published."""
        return f"{self.authors}, arXiv:{self.arxiv}" if self.arxiv else ""

    @property
    def url(self) -> str | None:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None


METHODS = {
    "rtn": MethodName("RTN"),
    "gptq": MethodName("GPTQ", "Frantar et al. 2022", "2210.17323"),
    "adaround": MethodName("AdaRound", "Nagel et al. 2020", "2004.10568"),
    "svdquant": MethodName("SVDQuant", "Li et al. 2025", "2411.05007"),
    "uniform": MethodName("uniform activations"),
    "ptq4vit": MethodName("PTQ4ViT", "Yuan et al. 2022", "2111.12293"),
    "repq": MethodName("RepQ-ViT", "Li et al. 2023", "2212.08254"),
    "adalog": MethodName("AdaLog", "Wu et al. 2024", "2407.12951"),
    "igq": MethodName("IGQ-ViT", "Moon et al. 2024", "2404.00928"),
    "smoothquant": MethodName("SmoothQuant", "Xiao et al. 2022", "2211.10438"),
    "bias_compensation": MethodName("bias compensation", "Gong et al. 2024", "2404.01892"),
    "fixed_point_training": MethodName("fixed-point training", "Kim et al. 2024", "2407.12637"),
    "softmax_bias": MethodName("softmax bias correction", "Pandey et al. 2023", "2309.01729"),
    "accuquant": MethodName("AccuQuant", "Lee et al. 2025", "2510.20348"),
    "noise_correction": MethodName("noise correction", "He et al. 2023", "2305.10657"),
}


TAC = MethodName("noise correction", "Yao et al. 2024", "2407.03917")


def method_of(step: Step) -> MethodName:
    """What a step is called and who published it; noise correction has two papers."""
    if isinstance(step, NoiseCorrectionStep) and step.rule == "tac":
        return TAC
    return METHODS[step.method]


def bytes_text(count: float) -> str:
    """Bytes in decimal units with three digits: 4.05 MB."""
    return _scaled(count, _BYTES)


def operations_text(count: float) -> str:
    """A large count with three digits and a prefix: 281 G."""
    return _scaled(count, _COUNTS)


def overhead_text(operations: BitOperations) -> str:
    """What is found at run time, as a share of the products: 2.49 %."""
    return f"{100 * operations.overhead / operations.base:.2f} %"


def _scaled(count: float, units: tuple[str, ...]) -> str:
    value = float(count)
    for unit in units:
        if abs(value) < 999.5 or unit == units[-1]:
            break
        value /= 1000
    whole = unit == units[0] or abs(value) >= 999.5
    return (f"{value:,.0f} {unit}" if whole else f"{value:.3g} {unit}").rstrip()


def seconds_text(seconds: float) -> str:
    """A duration in its two largest units: 0.42 s, 41 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def number_text(value: float | None) -> str:
    """A figure with four or more digits, as the papers print perplexity: 14.613; 1.2e+05."""
    if value is None:
        return "–"
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if abs(value) >= 1e5 or (value and abs(value) < 1e-3):
        return f"{value:.3g}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.1f}"


def change_text(value: float | None, base: float | None) -> str:
    """The change from `base` in per cent with its sign, or nothing where there is none."""
    if value is None or not base:
        return ""
    change = 100 * (value - base) / abs(base)
    if change != change or abs(change) == float("inf"):
        return ""
    return _signed(f"{change:+.2f} %" if abs(change) < 100 else f"{change:+,.0f} %")


def metric_text(metric: str) -> str:
    """A metric in words: perplexity, top-1 accuracy, KL divergence in nats."""
    return _METRICS.get(metric, metric)


def higher_is_better(metric: str) -> bool:
    return metric in _HIGHER


def figure_text(metric: str, value: float | None) -> str:
    """A measured figure as its metric is printed: accuracies, shares in [0, 1], as 97.54 %."""
    if value is None:
        return "–"
    if metric in _ACCURACIES:
        return f"{100 * value:.2f} %"
    return f"{value:.4g}" if metric in ("kl", *_SAMPLED) else number_text(value)


def figure_change_text(metric: str, value: float | None, base: float | None) -> str:
    """The change of a figure: of an accuracy in points, −0.31 points; of anything else in per cent."""
    if metric not in _ACCURACIES:
        return change_text(value, base)
    if value is None or base is None:
        return ""
    points = round(100 * (value - base), 2) + 0.0  # no minus before a zero
    return _signed(f"{points:+.2f} points")


def samples_text(metric: str, samples: int) -> str:
    """What a figure was measured on: 412 windows of text, 1,000 images, 64 samples."""
    noun = "window" if metric == "perplexity" else "sample" if metric in _SAMPLED else "image"
    return f"{samples:,} {noun}{'' if samples == 1 else 's'}"


def contents_text(dataset: DatasetRead) -> str:
    """What an upload holds: 3 documents, 12,345 characters; or 1,297 images, 10 classes."""
    if dataset.images is None:
        return f"{dataset.documents:,} documents, {dataset.characters:,} characters"
    labels = "no labels" if dataset.classes is None else f"{dataset.classes:,} classes"
    return f"{dataset.images:,} images, {labels}"


def recipe_text(recipe: Iterable[Step]) -> str:
    """A recipe in one line: `GPTQ 4 bits, groups of 128 + bias compensation`."""
    return " + ".join(_step_text(step) for step in recipe)


def spec_text(spec: JobSpec) -> str:
    """What a job is, in one line."""
    return f"{spec.model.id}: {recipe_text(spec.recipe)}"


def _step_text(step: Step) -> str:
    name = METHODS[step.method].name
    if isinstance(step, BiasCompensationStep):
        levels = f" ({', '.join(step.levels)})" if step.levels else ""
        return name + (" per position" if step.granularity == "position_channel" else "") + levels
    if isinstance(step, SoftmaxBiasStep):
        return name
    if isinstance(step, NoiseCorrectionStep):
        return f"{name} ({step.rule}{', absorbing noise' if step.absorb else ''})"
    if isinstance(step, AccuquantStep):
        return f"{name}, {step.group} steps a group" + (
            ", exact gradient" if step.gradient == "exact" else ""
        )
    if isinstance(step, TrainingStep):
        return f"{name} {training_bits_text(step)}, {step.epochs} epochs"
    words = [f"{name} {step.bits} bits"]
    if isinstance(step, WeightStep):
        if step.group_size:
            words.append(f"groups of {step.group_size}")
        if not step.symmetric:
            words.append("asymmetric")
    elif isinstance(step, IgqStep):
        words.append(f"{step.groups} groups" + (", published bounds" if step.bounds == "mean" else ""))
    elif isinstance(step, RepqStep) and step.softmax == "log":
        words.append("published softmax")
    elif isinstance(step, UniformStep | SmoothquantStep):
        words.append(f"per {step.granularity}")
    if isinstance(step, ActivationGrid) and step.softmax_bits:
        words.append(f"softmax {step.softmax_bits} bits")
    return ", ".join(words)


def training_bits_text(step: TrainingStep) -> str:
    """Bits of weights, activations and gradients: 4/4/4; 4/4/32 where gradients stay as they are."""
    grid = step.gradient
    gradient = 32 if grid is None else grid.bits or step.bits
    return f"{step.bits}/{step.activation_bits or step.bits}/{gradient}"


def _signed(text: str) -> str:
    """With a minus sign as print has it."""
    return text.replace("-", "−")
