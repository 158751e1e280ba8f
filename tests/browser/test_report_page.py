"""The report as a reader sees it: opened from a folder, on paper, in the dark, on a phone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from app.shared.leases import Claim
from quantry.reports import BlockReport, Report
from tests.live_server import make_report, request
from worker.report import write_report

pytestmark = pytest.mark.browser

CONTRAST = """
() => {
  const linear = x => (x /= 255) <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
  const light = c => .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2]);
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const ground = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const e of document.querySelectorAll('body *')) {
    if (e.closest('svg') || !e.checkVisibility()) continue;
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) low.push(`${e.tagName} ${e.textContent.trim().slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return low;
}
"""
OUTSIDE = """
svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text, circle, rect, path')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1
      || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
  }).map(e => e.outerHTML);
}
"""


@pytest.fixture
def report() -> Report:
    claim = Claim("job_x", 1, "hands", request().resolve(), {})
    blocks = tuple(
        BlockReport(
            index=index,
            relative_mse=0.01 * 2**index,
            relative_mse_evaluation=0.011 * 2**index,
            relative_mse_rtn=0.05 * 2**index,
            seconds=1,
        )
        for index in range(12)
    )
    return make_report(claim).model_copy(update={"blocks": blocks, "warnings": ("a warning",)})


@pytest.fixture
def address(report: Report, tmp_path: Path) -> str:
    write_report(tmp_path, report)
    return (tmp_path / "report.html").as_uri()


def test_it_opens_from_a_folder_without_a_complaint(tab: Page, address: str, complaints: list[str]) -> None:
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(address)
    expect(tab.get_by_role("heading", level=1)).to_have_text("tiny")
    expect(tab.get_by_role("img", name=re.compile("Relative error"))).to_have_count(1)
    assert asked == [address]
    assert complaints == []


@pytest.mark.parametrize("width", [400, 700, 1400])
def test_it_fits_the_screen_and_the_chart_its_frame(tab: Page, address: str, width: int) -> None:
    tab.set_viewport_size({"width": width, "height": 900})
    tab.goto(address)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    chart = tab.locator("svg.chart:visible")
    expect(chart).to_have_count(1)
    assert chart.evaluate(OUTSIDE) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_told_from_its_ground(tab: Page, address: str, scheme: str) -> None:
    tab.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    tab.goto(address)
    assert tab.evaluate(CONTRAST) == []


def test_on_paper_the_folded_tables_are_open(tab: Page, address: str) -> None:
    tab.goto(address)
    tab.emulate_media(media="print")
    expect(tab.get_by_text("0.0110", exact=True).first).to_be_visible()
    assert tab.pdf().startswith(b"%PDF")
