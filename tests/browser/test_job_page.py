"""A job from the form to its files, in a browser, with scripts and without."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser, Page, expect

from quantry.jobs import State
from tests.live_server import MODEL, LiveServer

pytestmark = pytest.mark.browser
FILES = {"model.safetensors": b"weights", "config.json": b"{}"}


def sign_in(tab: Page, live: LiveServer) -> None:
    tab.goto(live.url)
    tab.get_by_label("API key").fill(live.key)
    tab.get_by_role("button", name="Sign in").click()


def submit(tab: Page) -> str:
    tab.get_by_role("combobox", name="Model").fill(MODEL)
    tab.get_by_label("Tokens a window").fill("32")
    tab.get_by_label("Windows or images", exact=True).fill("4")
    tab.get_by_role("button", name="Submit").click()
    return tab.url.rpartition("/")[2]


def test_a_job_is_followed_live(tab: Page, live: LiveServer, complaints: list[str]) -> None:
    sign_in(tab, live)
    job = submit(tab)
    status = tab.get_by_role("status")
    expect(status).to_contain_text("waiting for a worker")
    claim = live.claim(job)
    live.step(claim, State.QUANTIZING, "block 2 of 6", 2, 6)
    expect(status).to_contain_text("block 2 of 6, about 4 s left")
    expect(tab.get_by_role("progressbar")).to_have_attribute("value", "2")
    live.succeed(claim, FILES)
    expect(status).to_contain_text("succeeded")
    expect(tab.get_by_role("link", name="model.safetensors")).to_be_visible()
    assert tab.evaluate("performance.getEntriesByType('navigation')[0].type") == "navigate"
    with tab.expect_download() as started:
        tab.get_by_role("link", name="model.safetensors").click()
    assert started.value.path().read_bytes() == b"weights"
    assert complaints == []


def test_a_job_is_cancelled(tab: Page, live: LiveServer, complaints: list[str]) -> None:
    sign_in(tab, live)
    job = submit(tab)
    claim = live.claim(job)
    tab.get_by_role("button", name="Cancel").click()
    expect(tab.get_by_role("status")).to_contain_text("cancelling")
    live.cancelled(claim)
    expect(tab.get_by_role("button", name="Try again")).to_be_visible()
    assert complaints == []


def test_without_scripts_the_page_reloads(chromium: Browser, live: LiveServer) -> None:
    context = chromium.new_context(java_script_enabled=False)
    tab = context.new_page()
    sign_in(tab, live)
    job = submit(tab)
    live.fail(live.claim(job))
    expect(tab.get_by_role("alert")).to_contain_text("12 GB needed", timeout=20_000)
    context.close()


@pytest.mark.parametrize("width", [400, 1400])
def test_pages_fit_the_screen(tab: Page, live: LiveServer, width: int) -> None:
    sign_in(tab, live)
    job = submit(tab)
    live.succeed(live.claim(job), FILES)
    tab.set_viewport_size({"width": width, "height": 900})
    for path in ("/", f"/jobs/{job}", f"/jobs/{job}/report"):
        tab.goto(live.url + path)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
