"""Charts as SVG text: no script, no style attribute; colours come from the page's classes.

Every chart is an image to a screen reader, with a title and a sentence that says what it shows; the figures
themselves stand in a table beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from worker.report.scales import (
    LinearScale,
    LogScale,
    index_ticks,
    log_bounds,
    log_ticks,
    positive,
    tick_text,
)


@dataclass(frozen=True)
class Series:
    """One line. `kind` is its class on the page (colour and dashes) and picks its mark."""

    name: str
    kind: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Frame:
    """The size of a drawing and the room around its plot, in units of CSS pixels."""

    width: int
    height: int
    left: int = 58
    right: int = 14
    top: int = 34
    bottom: int = 42


FRAMES = (("wide", Frame(960, 340)), ("narrow", Frame(360, 300, left=52, right=6)))  # by class on the page


def line_chart(
    series: Sequence[Series], *, frame: Frame, name: str, title: str, about: str, x_label: str
) -> Markup:
    """Lines over the index of each value, on a logarithmic axis; values that are None or 0 leave a gap.

    Args: name: unique on the page, for the ids. Returns nothing if there is no value to show.
    """
    shown = [s for s in series if positive(s.values)]
    values = [v for s in shown for v in positive(s.values)]
    if not values:
        return Markup("")
    low, high = log_bounds(values)
    count = max(len(s.values) for s in shown)
    x = LinearScale(0, max(1, count - 1), frame.left + 8, frame.width - frame.right - 8)
    y = LogScale(low, high, frame.height - frame.bottom, frame.top)
    parts = [*_y_axis(frame, y), *_x_axis(frame, x, count, x_label), *_legend(frame, shown)]
    for line in shown:
        parts += _line(line, x, y)
    return _svg(frame, parts, name, title, about)


def bar(value: float | None, *, low: float, high: float, width: int = 96, kind: str = "ours") -> Markup:
    """A bar from `low` to `value`, for a cell of a table whose text holds the figure."""
    if value is None:
        return Markup("")
    x = LinearScale(low, high, 0, width)
    parts = [_tag("rect", {"class": "track", "width": width, "height": 10, "y": 2, "rx": 2})]
    parts += [_tag("rect", {"class": f"fill {kind}", "width": _n(x(value)), "height": 10, "y": 2, "rx": 2})]
    return _cell(width, parts)


def dumbbell(
    before: float | None, after: float | None, *, low: float, high: float, width: int = 96
) -> Markup:
    """Two values on a logarithmic line, for a cell of a table whose text holds the figures."""
    if not positive([before]) or not positive([after]):
        return Markup("")
    assert before is not None
    assert after is not None
    x = LogScale(low, high, 5, width - 5)
    first, second = _n(x(before)), _n(x(after))
    parts = [
        _tag("line", {"class": "rule", "x1": 0, "x2": width, "y1": 7, "y2": 7}),
        _tag("line", {"class": "stem ours", "x1": first, "x2": second, "y1": 7, "y2": 7}),
        _tag("circle", {"class": "hollow rtn", "cx": first, "cy": 7, "r": 4}),
        _tag("circle", {"class": "dot ours", "cx": second, "cy": 7, "r": 4}),
    ]
    return _cell(width, parts)


def _line(line: Series, x: LinearScale, y: LogScale) -> list[Markup]:
    """The path with its gaps, and a mark on each value where they are few enough to tell apart."""
    path, pen = [], "M"
    marks = []
    for index, value in enumerate(line.values):
        if not positive([value]):
            pen = "M"
            continue
        assert value is not None
        px, py = _n(x(index)), _n(y(value))
        path.append(f"{pen}{px} {py}")
        pen = "L"
        if len(line.values) <= 40:
            marks.append(_mark(line.kind, x(index), y(value)))
    return [_tag("path", {"class": f"line {line.kind}", "d": " ".join(path)}), *marks]


def _mark(kind: str, x: float, y: float) -> Markup:
    """A shape a kind, so that lines differ without colour."""
    if kind == "rtn":
        return _tag("rect", {"class": "dot rtn", "x": _n(x - 3), "y": _n(y - 3), "width": 6, "height": 6})
    if kind == "seen":
        corners = f"{_n(x)},{_n(y - 4)} {_n(x + 4)},{_n(y + 3)} {_n(x - 4)},{_n(y + 3)}"
        return _tag("polygon", {"class": "hollow seen", "points": corners})
    return _tag("circle", {"class": f"dot {kind}", "cx": _n(x), "cy": _n(y), "r": 3.5})


def _y_axis(frame: Frame, y: LogScale) -> Iterable[Markup]:
    for tick in log_ticks(y.low, y.high):
        at = _n(y(tick))
        yield _tag(
            "line", {"class": "rule", "x1": frame.left, "x2": frame.width - frame.right, "y1": at, "y2": at}
        )
        yield _text(tick_text(tick), frame.left - 8, y(tick) + 4, "end")


def _x_axis(frame: Frame, x: LinearScale, count: int, label: str) -> Iterable[Markup]:
    base = frame.height - frame.bottom
    for index in index_ticks(count, 16 if frame.width > 500 else 8):
        yield _text(str(index), x(index), base + 18, "middle")
    yield _text(label, (frame.left + frame.width - frame.right) / 2, frame.height - 6, "middle")


def _legend(frame: Frame, series: Sequence[Series]) -> Iterable[Markup]:
    at = float(frame.left)
    for line in series:
        yield _tag(
            "line", {"class": f"line {line.kind}", "x1": _n(at), "x2": _n(at + 22), "y1": 14, "y2": 14}
        )
        yield _mark(line.kind, at + 11, 14)
        yield _text(line.name, at + 28, 18, "start")
        at += 28 + 6.9 * len(line.name) + 14


def _svg(frame: Frame, parts: Iterable[Markup], name: str, title: str, about: str) -> Markup:
    head = [
        _tag("title", {"id": f"{name}-t"}, escape(title)),
        _tag("desc", {"id": f"{name}-d"}, escape(about)),
    ]
    box = {
        "viewBox": f"0 0 {frame.width} {frame.height}",
        "role": "img",
        "aria-labelledby": f"{name}-t {name}-d",
        "class": "chart",
    }
    return _tag("svg", box, *head, *parts)


def _cell(width: int, parts: Iterable[Markup]) -> Markup:
    box: dict[str, str | int | float] = {
        "viewBox": f"0 0 {width} 14",
        "preserveAspectRatio": "xMinYMid",
        "width": width,
        "height": 14,
        "aria-hidden": "true",
        "class": "cell",
    }
    return _tag("svg", box, *parts)


def _text(text: str, x: float, y: float, anchor: str) -> Markup:
    return _tag("text", {"x": _n(x), "y": _n(y), "text-anchor": anchor}, escape(text))


def _tag(name: str, attributes: Mapping[str, str | int | float], *children: Markup) -> Markup:
    text = "".join(f' {key}="{escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{text}>{''.join(children)}</{name}>")


def _n(value: float) -> str:
    return f"{value:.1f}"
