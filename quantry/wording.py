"""How numbers and recipes are said to people: in the terminal, on the pages, in the report. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from quantry.contract import BiasCompensationStep, GptqStep, JobSpec, RtnStep

_UNITS = ("B", "kB", "MB", "GB", "TB")
_METHODS = {"rtn": "RTN", "gptq": "GPTQ"}


def bytes_text(count: float) -> str:
    """Bytes in decimal units with three digits: 4.05 MB."""
    value = float(count)
    for unit in _UNITS:
        if abs(value) < 999.5 or unit == _UNITS[-1]:
            break
        value /= 1000
    whole = unit == "B" or abs(value) >= 999.5
    return f"{value:,.0f} {unit}" if whole else f"{value:.3g} {unit}"


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
    return f"{change:+.2f} %" if abs(change) < 100 else f"{change:+,.0f} %"


def recipe_text(recipe: Iterable[RtnStep | GptqStep | BiasCompensationStep]) -> str:
    """A recipe in one line: `GPTQ 4 bits, groups of 128 + bias compensation`."""
    return " + ".join(_step_text(step) for step in recipe)


def spec_text(spec: JobSpec) -> str:
    """What a job is, in one line."""
    return f"{spec.model.id}: {recipe_text(spec.recipe)}"


def _step_text(step: RtnStep | GptqStep | BiasCompensationStep) -> str:
    if isinstance(step, BiasCompensationStep):
        return "bias compensation" + (" per position" if step.granularity == "position_channel" else "")
    words = [f"{_METHODS[step.method]} {step.bits} bits"]
    if step.group_size:
        words.append(f"groups of {step.group_size}")
    if not step.symmetric:
        words.append("asymmetric")
    return ", ".join(words)
