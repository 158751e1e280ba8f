"""How numbers are said."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import pytest

from quantry.contract import DatasetRead
from quantry.recipe import (
    ACTIVATION_METHODS,
    CORRECTION_METHODS,
    TRAINING_METHODS,
    WEIGHT_METHODS,
    BiasCompensationStep,
    GptqStep,
    IgqStep,
    NoiseCorrectionStep,
    Ptq4vitStep,
    RepqStep,
    RtnStep,
    SoftmaxBiasStep,
    Step,
    UniformStep,
)
from quantry.reports import BitOperations
from quantry.wording import (
    METHODS,
    bytes_text,
    change_text,
    contents_text,
    figure_change_text,
    figure_text,
    higher_is_better,
    metric_text,
    number_text,
    operations_text,
    overhead_text,
    recipe_text,
    samples_text,
    seconds_text,
)


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (4_050_000, "4.05 MB"),
        (999_600, "1 MB"),
        (2e15, "2,000 TB"),
    ],
)
def test_bytes(count: float, said: str) -> None:
    assert bytes_text(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.042, "0.042 s"),
        (9.96, "10 s"),
        (41.4, "41 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert seconds_text(seconds) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (14.6128, "14.613"),
        (5840.04, "5840.0"),
        (1.23e5, "1.23e+05"),
        (0.0, "0.000"),
        (math.inf, "inf"),
    ],
)
def test_figures(value: float | None, said: str) -> None:
    assert number_text(value) == said


@pytest.mark.parametrize(
    ("value", "base", "said"),
    [
        (15, 10, "+50.00 %"),
        (9, 10, "−10.00 %"),
        (100, 10, "+900 %"),
        (None, 10, ""),
        (1, None, ""),
        (1, 0, ""),
        (math.inf, 1, ""),
    ],
)
def test_changes(value: float | None, base: float | None, said: str) -> None:
    assert change_text(value, base) == said


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [
        ("top1", 0.97541, "97.54 %"),
        ("top5", 1.0, "100.00 %"),
        ("top1", 0.0, "0.00 %"),
        ("kl", 0.0123456, "0.01235"),
        ("kl", 0.0, "0"),
        ("perplexity", 14.6128, "14.613"),
        ("top1", None, "–"),
    ],
)
def test_figures_as_their_metric_is_printed(metric: str, value: float | None, said: str) -> None:
    assert figure_text(metric, value) == said


@pytest.mark.parametrize(
    ("metric", "value", "base", "said"),
    [
        ("top1", 0.9723, 0.9754, "−0.31 points"),
        ("top5", 0.98, 0.95, "+3.00 points"),
        ("top1", 0.97539, 0.9754, "+0.00 points"),
        ("top1", 0.5, 0.0, "+50.00 points"),
        ("top1", 0.5, None, ""),
        ("top1", None, 0.5, ""),
        ("kl", 0.1, 0.0, ""),
        ("perplexity", 9, 10, "−10.00 %"),
    ],
)
def test_an_accuracy_changes_by_points(
    metric: str, value: float | None, base: float | None, said: str
) -> None:
    assert figure_change_text(metric, value, base) == said


def test_metrics_have_words_units_and_a_direction() -> None:
    assert [metric_text(name) for name in ("perplexity", "top1", "top5", "kl")] == [
        "perplexity",
        "top-1 accuracy",
        "top-5 accuracy",
        "KL divergence, nats",
    ]
    assert [name for name in ("perplexity", "top1", "top5", "kl") if higher_is_better(name)] == [
        "top1",
        "top5",
    ]
    assert samples_text("perplexity", 412) == "412 windows"
    assert samples_text("top1", 10_000) == "10,000 images"
    assert samples_text("kl", 1) == "1 image"


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0"), (999, "999"), (1500, "1.5 k"), (2.81e11, "281 G"), (999_600, "1 M"), (2e18, "2,000 P")],
)
def test_counts(count: float, said: str) -> None:
    assert operations_text(count) == said


def test_the_overhead_is_a_share_of_the_products() -> None:
    assert overhead_text(BitOperations(base=2e11, overhead=5e9)) == "2.50 %"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"documents": 3, "characters": 12345}, "3 documents, 12,345 characters"),
        ({"images": 1297, "classes": 10}, "1,297 images, 10 classes"),
        ({"images": 32}, "32 images, no labels"),
    ],
)
def test_what_an_upload_holds(fields: dict[str, int], said: str) -> None:
    dataset = DatasetRead(
        **{"documents": 0, "characters": 0, **fields},
        id="ds_1",
        name="n",
        bytes=1,
        sha256="0" * 64,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )
    assert contents_text(dataset) == said


def test_every_method_has_a_name_and_a_paper_unless_nobody_wrote_one() -> None:
    known = (*WEIGHT_METHODS, *ACTIVATION_METHODS, *CORRECTION_METHODS, *TRAINING_METHODS)
    assert set(METHODS) == set(known)
    assert {method for method, named in METHODS.items() if not named.url} == {"rtn", "uniform"}
    assert METHODS["repq"].citation == "Li et al. 2023, arXiv:2212.08254"
    assert METHODS["repq"].url == "https://arxiv.org/abs/2212.08254"
    assert METHODS["rtn"].citation == ""


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (UniformStep(bits=8, granularity="token"), "uniform activations 8 bits, per token"),
        (Ptq4vitStep(bits=6), "PTQ4ViT 6 bits"),
        (IgqStep(bits=4, softmax_bits=8), "IGQ-ViT 4 bits, 8 groups, softmax 8 bits"),
        (SoftmaxBiasStep(), "softmax bias correction"),
    ],
)
def test_steps_for_activations(step: Step, said: str) -> None:
    assert recipe_text((step,)) == said


def test_recipes() -> None:
    recipe = (
        GptqStep(bits=3, group_size=64, symmetric=False),
        BiasCompensationStep(granularity="position_channel"),
    )
    assert recipe_text(recipe) == "GPTQ 3 bits, groups of 64, asymmetric + bias compensation per position"
    assert recipe_text((RtnStep(bits=8),)) == "RTN 8 bits"
    noise = NoiseCorrectionStep(absorb=True)
    assert recipe_text((RtnStep(bits=8), noise)).endswith("(ptqd, absorbing noise)")
    assert recipe_text((RepqStep(bits=4, softmax="log"),)) == "RepQ-ViT 4 bits, published softmax"
    levels = BiasCompensationStep(levels=("module", "block"))
    assert recipe_text((levels,)) == "bias compensation (module, block)"
