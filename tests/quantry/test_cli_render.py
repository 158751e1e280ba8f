"""What the command line prints, and the requests its options make, for language models and image classifiers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, get_args

import pytest
from rich.console import Console, RenderableType

from quantry.cli import render
from quantry.cli.options import Correction, Method
from quantry.cli.request import Options, build_request
from quantry.cli.session import Session
from quantry.client import Client, InvalidRequest
from quantry.contract import DatasetRead
from quantry.jobs import JobRead, State
from quantry.recipe import UniformStep
from quantry.reports import (
    BitOperations,
    CostReport,
    LayerReport,
    OperandReport,
    QualityRow,
    Report,
    SizeReport,
)
from quantry.requests import JobRequest

TEXT = QualityRow(metric="perplexity", dataset="pydoc", samples=9, fp=14.0, rtn=19.0, quantized=15.0)
IMAGES = (
    QualityRow(metric="top1", dataset="digits", samples=1000, fp=0.9754, rtn=0.6812, quantized=0.9723),
    QualityRow(metric="kl", dataset="digits", samples=1000, fp=0.0, rtn=1.25, quantized=0.01234),
)


CONSOLE = Console(file=io.StringIO(), width=200, highlight=False)


def printed(*shown: RenderableType) -> str:
    with CONSOLE.capture() as captured:
        CONSOLE.print(*shown)
    return captured.get()


def job(*quality: QualityRow, **fields: Any) -> JobRead:
    request = JobRequest.model_validate({"model": "local:vit", "bits": 4, **fields})
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return JobRead(id="job_1", state=State.SUCCEEDED, created_at=now, spec=request.resolve(), quality=quality)


@pytest.fixture
def session() -> Iterator[Session]:
    with Client("http://127.0.0.1:9", "qz_none") as client:
        yield Session(client, as_json=False)


def options(**changed: Any) -> Options:
    fields: dict[str, Any] = {
        "spec": None,
        "model": "local:vit",
        "fields": {"bits": 4},
        "calibration": None,
        "calibration_fields": {},
        "evaluation": None,
        "evaluate": True,
        "accept": {},
        "labels": [],
    }
    return Options(**fields | changed)


def test_quality_is_said_in_the_units_of_its_metric() -> None:
    text = printed(render.quality_table((TEXT, *IMAGES)))
    for words in (
        "perplexity",
        "pydoc (9 windows)",
        "15.000 (+7.14 %)",
        "top-1 accuracy",
        "digits (1,000 images)",
        "97.54 %",
        "97.23 % (−0.31 points)",
        "68.12 % (−29.42 points)",
        "KL divergence, nats",
        "0.01234",
    ):
        assert words in text


def test_a_list_of_jobs_names_the_metric_of_each() -> None:
    text = printed(render.jobs_table([job(*IMAGES, method="repq"), job(TEXT), job()]))
    assert "top-1 accuracy 97.23 % (−0.31 points)" in text
    assert "perplexity 15.000 (+7.14 %)" in text
    assert "RTN 4 bits + RepQ-ViT 4 bits" in text


def test_ids_are_whole_in_a_terminal_of_80_columns() -> None:
    listed = job(TEXT).model_copy(update={"id": "job_01a21440-eed3-77d2-ae83-2396f84d499c"})
    upload = DatasetRead(
        id="ds_01a2143a-7a19-7db9-b73f-499dc24f0ada",
        name="a-text-of-some-length.txt",
        bytes=123_456,
        sha256="0" * 64,
        documents=1234,
        characters=123_456,
        created_at=listed.created_at,
    )
    console = Console(file=io.StringIO(), width=80, highlight=False)
    with console.capture() as captured:
        console.print(render.jobs_table([listed]), render.datasets_table([upload]))
    text = captured.get()
    assert listed.id in text
    assert upload.id in text
    assert "…" not in text


def test_a_report_shows_its_activations_and_bit_operations() -> None:
    operands = tuple(
        OperandReport(
            name=f"vit.layers.{block}.attention.probabilities",
            kind="probabilities",
            bits=4,
            quantizer="twin_softmax",
            sqnr_db=None if block == 7 else 20.0 - block,
        )
        for block in range(8)
    )
    report = Report(
        quality=IMAGES,
        size=SizeReport(fp_bytes=4000, quantized_bytes=1000, effective_bits=4.1, quantized_weights=1000),
        layers=(LayerReport(name="vit.layers.0.mlp.fc1", bits=4, group_size=None, sqnr_db=18.0),),
        blocks=(),
        operands=operands,
        bit_operations=BitOperations(base=2.81e11, overhead=7e9),
        cost=CostReport(wall_s=3.0, cpu_s=5.0, peak_rss_bytes=10**9),
        environment={},
        fingerprint="0" * 64,
        format="quantry",
    )
    with CONSOLE.capture() as captured:
        render.show_report(CONSOLE, report)
    text = captured.get()
    assert "97.23 % (−0.31 points)" in text
    assert "281 G bit operations a forward, 2.49 % more" in text
    assert "vit.layers.6.attention.probabilities" in text
    assert "vit.layers.1.attention.probabilities" not in text  # the five worst, measured ones first
    assert "vit.layers.7.attention.probabilities" not in text
    assert "twin_softmax" in text


def test_the_options_offer_what_the_contract_takes() -> None:
    taken = get_args(get_args(JobRequest.model_fields["method"].annotation)[0])
    assert {method.value for method in Method} == set(taken)
    corrections = get_args(get_args(JobRequest.model_fields["correction"].annotation)[0])
    assert {correction.value for correction in Correction} == set(corrections)


@pytest.mark.parametrize("method", list(Method))
def test_each_method_makes_a_recipe(method: Method, session: Session) -> None:
    request = build_request(session, options(fields={"bits": 6, "method": method}))
    spec = request.resolve()
    assert spec.recipe[0].bits == 6
    assert method.value in [step.method for step in spec.recipe]


def test_gates_for_perplexity_and_accuracy(session: Session) -> None:
    accept = {"perplexity_increase_max": None, "accuracy_drop_max": 0.02}
    request = build_request(session, options(accept=accept))
    assert request.accept.accuracy_drop_max == 0.02
    assert request.accept.perplexity_increase_max is None
    with pytest.raises(InvalidRequest, match="accuracy_drop_max"):
        build_request(session, options(accept={"accuracy_drop_max": 2.0}))


def test_a_recipe_gives_activations_bits_of_their_own(session: Session, tmp_path: Any) -> None:
    file = tmp_path / "job.json"
    file.write_text(
        '{"model": "local:vit", "recipe": [{"method": "gptq", "bits": 4},'
        ' {"method": "uniform", "bits": 8, "softmax_bits": 6}]}'
    )
    request = build_request(session, options(model=None, fields={}, spec=str(file)))
    step = request.resolve().activation_step
    assert isinstance(step, UniformStep)
    assert (step.bits, step.softmax_bits) == (8, 6)
