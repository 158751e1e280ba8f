"""The drawings: values land where the axis says."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.report.charts import Frame, Series, bar, dumbbell, line_chart
from worker.report.scales import LogScale, index_ticks, log_bounds, log_ticks

FRAME = Frame(600, 300)
magnitudes = st.floats(-8, 4).map(lambda p: 10.0**p)


def draw(*series: Series) -> str:
    return str(line_chart(series, frame=FRAME, name="c", title="t", about="a", x_label="block"))


@given(st.lists(magnitudes, min_size=1, max_size=40))
def test_bounds_hold_every_value_and_ticks_stay_within(values: list[float]) -> None:
    low, high = log_bounds(values)
    assert low < high
    assert low <= min(values) * 1.00001
    assert high >= max(values) * 0.99999
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 9
    assert all(low * 0.9999 <= tick <= high * 1.0001 for tick in ticks)


def test_a_decade_is_the_same_length_everywhere() -> None:
    scale = LogScale(1e-4, 1.0, 0.0, 400.0)
    places = [scale(10.0**-p) for p in range(5)]
    assert places == pytest.approx([400.0, 300.0, 200.0, 100.0, 0.0])


@pytest.mark.parametrize("count", [1, 2, 6, 12, 32, 80, 126])
def test_index_ticks_start_at_zero_and_are_few(count: int) -> None:
    ticks = index_ticks(count, 16)
    assert ticks[0] == 0
    assert ticks[-1] < count
    assert len(ticks) <= 16


def test_a_smaller_error_is_lower_on_the_page() -> None:
    found = re.search(
        r'class="line ours" d="M([\d.]+) ([\d.]+) L([\d.]+) ([\d.]+)"', draw(Series("q", "ours", (0.1, 0.01)))
    )
    assert found is not None
    x0, y0, x1, y1 = map(float, found.groups())
    assert x0 < x1
    assert y0 < y1  # SVG counts downwards


def test_values_that_no_logarithm_has_leave_a_gap() -> None:
    svg = draw(Series("q", "ours", (0.1, None, 0.01, 0.0, 0.02, 0.03)))
    path = re.search(r'class="line ours" d="(.*?)"', svg)
    assert path is not None
    assert re.sub(r"[\d. ]", "", path[1]) == "MMML"


def test_nothing_to_show_draws_nothing() -> None:
    assert draw(Series("q", "ours", (None, 0.0, float("nan")))) == ""


def test_lines_differ_without_colour() -> None:
    svg = draw(
        Series("r", "rtn", (0.1, 0.2)), Series("q", "ours", (0.1, 0.2)), Series("s", "seen", (0.1, 0.2))
    )
    assert 'rect class="dot rtn"' in svg
    assert 'circle class="dot ours"' in svg
    assert 'polygon class="hollow seen"' in svg


@given(st.floats(0, 50))
def test_a_bar_never_leaves_its_track(value: float) -> None:
    widths = [
        float(w)
        for w in re.findall(
            r'rect class="[a-z ]+" width="([\d.]+)"', str(bar(value, low=0, high=40, width=100))
        )
    ]
    assert widths[0] == 100
    assert 0 <= widths[1] <= 100


def test_dumbbell_needs_both_ends() -> None:
    assert dumbbell(0.1, None, low=0.01, high=1) == ""
    assert dumbbell(0.0, 0.1, low=0.01, high=1) == ""
    assert str(dumbbell(0.1, 0.01, low=0.01, high=1)).count("<circle") == 2
