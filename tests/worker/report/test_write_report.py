"""The two files of a report: the same figures for programs and for people."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from quantry.reports import LayerReport, QualityRow, Report
from worker.errors import ExportError
from worker.report import write_report
from worker.report.page import quality_lines, render

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Outline(HTMLParser):
    """What a page is made of; fails on tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_json_gives_back_what_was_written(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path, report)
    assert Report.model_validate_json((tmp_path / "report.json").read_text(encoding="utf-8")) == report


def test_a_figure_that_json_cannot_carry_is_refused(report: Report, tmp_path: Path) -> None:
    broken = report.model_copy(
        update={"size": report.size.model_copy(update={"effective_bits": float("nan")})}
    )
    with pytest.raises(ExportError, match=r"size\.effective_bits"):
        write_report(tmp_path, broken)
    assert list(tmp_path.iterdir()) == []


def test_the_page_shows_the_three_networks_and_their_changes(report: Report) -> None:
    text = " ".join(outline(render(report)).text)
    for figure in ("14.612", "19.874", "15.981", "+36.01 %", "+9.37 %", "3.274", "3.23×"):
        assert figure in text
    assert "74 % of what rounding to nearest lost is won back" in text


def test_every_layer_and_block_has_its_row(report: Report) -> None:
    page = outline(render(report))
    words = " ".join(page.text)
    for block in range(6):
        assert f"model.decoder.layers.{block}" in words
    assert sum(1 for part in page.text if part == "self_attn.out_proj") == 6
    assert "0.0677" in words  # the residual error after the last block


def test_the_page_loads_nothing_and_runs_nothing(report: Report) -> None:
    html = render(report)
    page = outline(html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "form"})
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("style", "src", "href") for name in attributes)
    assert "@import" not in html
    assert "url(" not in html


def test_the_policy_of_the_page_allows_its_own_style(report: Report) -> None:
    html = render(report)
    style = re.search(r"<style>(.*?)</style>", html, re.S)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in html


def test_ids_are_unique_and_references_lead_somewhere(report: Report) -> None:
    page = outline(render(report))
    assert len(page.ids) == len(set(page.ids))
    for _, attributes in page.tags:
        for name in (attributes.get("aria-labelledby") or "").split():
            assert name in page.ids


def test_tables_have_captions_and_charts_have_words(report: Report) -> None:
    page = outline(render(report))
    names = [tag for tag, _ in page.tags]
    assert names.count("table") == names.count("caption")
    charts = [a for tag, a in page.tags if tag == "svg" and a.get("class") == "chart"]
    assert len(charts) == 2
    assert all(chart["role"] == "img" and chart["aria-labelledby"] for chart in charts)
    drawn = [a for tag, a in page.tags if tag == "svg" and a.get("class") == "cell"]
    assert all(cell["aria-hidden"] == "true" for cell in drawn)


def test_names_from_a_model_are_text_never_markup(report: Report) -> None:
    evil = "<img src=x onerror=alert(1)>\"'&"
    layer = report.layers[0].model_copy(update={"name": evil, "warnings": (evil,)})
    row = report.quality[0].model_copy(update={"dataset": evil})
    changed = report.model_copy(
        update={"layers": (layer,), "quality": (row,), "environment": {evil: evil}, "warnings": (evil,)}
    )
    page = outline(render(changed))
    assert all(tag != "img" for tag, _ in page.tags)
    assert "".join(page.text).count(evil) >= 5


def test_warnings_of_layers_are_said_once(report: Report) -> None:
    noted = tuple(layer.model_copy(update={"warnings": ("damping was raised",)}) for layer in report.layers)
    html = render(report.model_copy(update={"layers": noted, "warnings": ()}))
    assert html.count("damping was raised") == 1
    assert "and 32 more" in html


def test_many_layers_show_the_worst_first(report: Report) -> None:
    first = report.layers[0]
    layers = tuple(
        first.model_copy(update={"name": f"model.layers.{b}.mlp.up_proj", "sqnr_db": 40.0 - 0.1 * b})
        for b in range(80)
    )
    text = "\n".join(outline(render(report.model_copy(update={"layers": layers}))).text)
    assert "The 10 layers with the lowest SQNR" in text
    worst = text.index("model.layers.79.mlp.up_proj")
    assert worst < text.index("All 80 layers")
    assert text.index("model.layers.9\n") < text.index("model.layers.10\n")  # in the order they run


def test_a_job_without_evaluation_says_so(report: Report) -> None:
    unmeasured = dict.fromkeys(("relative_mse", "relative_mse_evaluation", "relative_mse_rtn", "mean_error"))
    bare = report.model_copy(
        update={
            "quality": (),
            "spec": None,
            "job": None,
            "estimate": {},
            "verification": {},
            "layers": tuple(LayerReport(name=f"h.{i}", bits=8, group_size=None) for i in range(2)),
            "blocks": tuple(b.model_copy(update=unmeasured) for b in report.blocks),
        }
    )
    page = outline(render(bare))
    assert "asked for no evaluation" in " ".join(page.text)
    assert all(a.get("class") != "chart" for tag, a in page.tags if tag == "svg")


@pytest.mark.parametrize(
    ("fp", "rtn", "quantized", "said"),
    [
        (10.0, 14.0, 11.0, "75 %"),
        (10.0, 10.0, 10.0, ""),
        (10.0, 12.0, 13.0, ""),
        (10.0, float("inf"), 12.0, ""),
    ],
)
def test_what_is_won_back(fp: float, rtn: float, quantized: float, said: str, report: Report) -> None:
    row = QualityRow(metric="perplexity", dataset="d", samples=1, fp=fp, rtn=rtn, quantized=quantized)
    html = render(report.model_copy(update={"quality": (row,)}))
    assert (f"{said} of what rounding" in html) == bool(said)


@pytest.mark.parametrize(
    ("quantized", "tone", "change"),
    [(14.0, "good", "−4.19 %"), (15.981, "plain", "+9.37 %"), (20.5, "bad", "+40.30 %")],
)
def test_a_result_is_bad_when_rounding_would_have_been_better(
    quantized: float, tone: str, change: str, report: Report
) -> None:
    row = report.quality[0].model_copy(update={"quantized": quantized})
    html = render(report.model_copy(update={"quality": (row,)}))
    assert f'<li class="{tone}"><strong>{change}</strong>' in html


def test_an_accuracy_is_a_share_and_changes_by_points(vision_report: Report) -> None:
    page = outline(render(vision_report))
    text = " ".join(page.text)
    for words in (
        "Top-1 accuracy on digits, test, 1,000 images",
        "97.54 %",
        "97.23 %",
        "−0.31 points",
        "−29.42 points",
        "97.23 % instead of 97.54 %",
        "KL divergence, nats on digits, test",
        "0.01234",
    ):
        assert words in text
    assert "windows" not in text
    assert "99 % of what rounding to nearest lost is won back" in text


def test_more_accuracy_than_before_is_no_loss(vision_report: Report) -> None:
    lines = {line.name: line for line in quality_lines(vision_report.quality[1])}  # top-5 rose
    assert lines["Quantized"].change == "+0.02 points"
    assert 'class="fill ours" width="0.0"' in lines["Quantized"].loss
    assert 'class="fill rtn" width="260.0"' in lines["Round to nearest"].loss


@pytest.mark.parametrize(
    ("metric", "quantized", "tone"),
    [
        ("top1", 0.98, "good"),
        ("top1", 0.8, "plain"),
        ("top1", 0.5, "bad"),
        ("perplexity", 0.98, "bad"),
        ("perplexity", 0.5, "good"),
    ],
)
def test_the_tone_follows_the_direction_of_the_metric(
    metric: str, quantized: float, tone: str, vision_report: Report
) -> None:
    row = QualityRow(metric=metric, dataset="d", samples=1, fp=0.9, rtn=0.7, quantized=quantized)
    html = render(vision_report.model_copy(update={"quality": (row,)}))
    assert f'<li class="{tone}"><strong>' in html


def test_every_quantized_activation_has_its_row(vision_report: Report) -> None:
    page = outline(render(vision_report))
    text = "\n".join(part for part in page.text if part.strip())
    assert page.text.count("attention.probabilities") == 3
    for words in ("vit.layers.2", "post norm", "twin softmax", "17.5", "0.9412", "0.9998"):
        assert words in text
    assert "misses its sum of 1 by 0.0588 as quantized and by 0.0002 after" in text
    assert "281 G" in text
    assert "7 G (2.49 % more)" in text


def test_activations_without_a_correction_have_no_sums(vision_report: Report) -> None:
    plain = tuple(
        operand.model_copy(update={"row_sum_before": None, "row_sum_after": None, "sqnr_db": None})
        for operand in vision_report.operands
    )
    page = outline(render(vision_report.model_copy(update={"operands": plain, "bit_operations": None})))
    text = " ".join(page.text)
    assert "Row sum before" not in text
    assert "Bit operations" not in text
    assert "attention.probabilities" in text


def test_a_job_on_weights_alone_says_nothing_of_activations(report: Report) -> None:
    text = " ".join(outline(render(report)).text)
    assert "Activations" not in text
    assert "Bit operations" not in text
    assert "Perplexity on bundled/pydoc, test, 412 windows" in text


def test_many_activations_show_the_worst_first(vision_report: Report) -> None:
    first = vision_report.operands[0]
    many = tuple(
        first.model_copy(update={"name": f"vit.layers.{b}.mlp.fc1.input", "sqnr_db": 40.0 - 0.1 * b})
        for b in range(80)
    )
    page = outline(render(vision_report.model_copy(update={"operands": many})))
    text = "\n".join(page.text)
    worst = text.index("The 10 activations with the lowest SQNR")
    assert worst < text.index("vit.layers.79.mlp.fc1.input") < text.index("All 80 activations")
    assert len(page.ids) == len(set(page.ids))


def test_blocks_of_stages_are_told_apart(vision_report: Report) -> None:
    names = ("swin.encoder.layers.0.blocks.1.mlp.fc1.input", "swin.encoder.layers.1.blocks.1.mlp.fc1.input")
    operands = tuple(vision_report.operands[0].model_copy(update={"name": name}) for name in names)
    text = outline(render(vision_report.model_copy(update={"operands": operands}))).text
    assert "swin.encoder.layers.0.blocks.1" in text
    assert "swin.encoder.layers.1.blocks.1" in text


def test_activations_stand_under_their_block_in_whatever_order_they_come(vision_report: Report) -> None:
    inputs = [operand for operand in vision_report.operands if operand.name.endswith(".input")]
    others = [operand for operand in vision_report.operands if not operand.name.endswith(".input")]
    text = outline(render(vision_report.model_copy(update={"operands": (*others, *inputs)}))).text
    for block in range(3):
        assert text.count(f"vit.layers.{block}") == 1
