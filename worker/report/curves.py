"""The training section of a report: loss, intervals and errors over the epochs, and a row for each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup

from quantry.reports import EpochReport, TrainedLayerReport, TrainingReport
from worker.report.charts import FRAMES, Series, line_chart


@dataclass(frozen=True)
class Curve:
    """A chart in both sizes, under its title."""

    title: str
    note: str
    drawings: tuple[tuple[str, Markup], ...]


@dataclass(frozen=True)
class TrainedRow:
    """A layer with the last values of its interval and of the error of its large gradients; None where it has none."""

    layer: TrainedLayerReport
    gamma: float | None
    large_error: float | None


def training_curves(training: TrainingReport | None) -> list[Curve]:
    """Loss, interval and error; what was not measured is left out."""
    if training is None:
        return []
    epochs, fp = training.epochs, training.fp_epochs
    loss = [Series("fixed point", "ours", _values(epochs, lambda e: e.loss))]
    if fp:
        loss.append(Series("full precision", "rtn", _values(fp, lambda e: e.loss)))
    if training.validation_images:
        loss.append(Series("validation", "seen", _values(epochs, lambda e: e.validation_loss)))
    curves = [
        _curve("loss", "Training loss", "Mean cross-entropy over the batches of an epoch, in nats.", loss),
        _curve(
            "gamma",
            "Interval of the gradients",
            "Half-width of each layer's grid over its largest gradient, after the epoch: median, least, largest layer.",
            _spread(epochs, lambda e: e.gamma.values()),
        ),
        _curve(
            "large",
            "Error of the large gradients",
            "Mean error of the top share alpha of the gradients, over the largest: median, least and largest layer.",
            _spread(epochs, lambda e: e.large_gradient_error.values()),
        ),
    ]
    return [curve for curve in curves if any(drawing for _, drawing in curve.drawings)]


def trained_rows(training: TrainingReport | None) -> list[TrainedRow]:
    """Every layer that trained in fixed point."""
    if training is None:
        return []
    last = training.epochs[-1]
    return [
        TrainedRow(layer, last.gamma.get(layer.name), last.large_gradient_error.get(layer.name))
        for layer in training.layers
    ]


def _curve(name: str, title: str, note: str, series: Sequence[Series]) -> Curve:
    drawings = tuple(
        (
            kind,
            line_chart(
                series,
                frame=frame,
                name=f"{name}-{kind}",
                title=f"{title}, logarithmic",
                about=_words(series),
                x_label="epoch, counted from 0",
            ),
        )
        for kind, frame in FRAMES
    )
    return Curve(title, note, drawings)


def _spread(epochs: Sequence[EpochReport], of: Callable[[EpochReport], Iterable[float]]) -> list[Series]:
    """Median, least and largest over the layers of each epoch."""
    picked: tuple[tuple[str, str, Callable[[list[float]], float]], ...] = (
        ("median", "ours", median),
        ("least", "seen", min),
        ("largest", "rtn", max),
    )
    found = [list(of(epoch)) for epoch in epochs]
    return [
        Series(name, kind, tuple(pick(values) if values else None for values in found))
        for name, kind, pick in picked
    ]


def _values(
    epochs: Sequence[EpochReport], of: Callable[[EpochReport], float | None]
) -> tuple[float | None, ...]:
    return tuple(of(epoch) for epoch in epochs)


def _words(series: Sequence[Series]) -> str:
    said = []
    for line in series:
        values = [value for value in line.values if value is not None]
        if values:
            said.append(f"{line.name}: from {values[0]:.3g} after the first epoch to {values[-1]:.3g}")
    return "; ".join(said) + " after the last."
