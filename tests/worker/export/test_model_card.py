"""README.md of an artifact: what it says of an image classifier."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantry.recipe import (
    AdalogStep,
    BiasCompensationStep,
    IgqStep,
    Ptq4vitStep,
    RepqStep,
    RtnStep,
    SoftmaxBiasStep,
    Step,
    UniformStep,
)
from quantry.reports import QualityRow, SizeReport
from worker.export import write_model_card

SIZE = SizeReport(fp_bytes=1000, quantized_bytes=250, effective_bits=4.02, quantized_weights=7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {"architectures": ["ViTForImageClassification"], "quantization_config": {"bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def card(folder: Path, recipe: tuple[Step, ...], *quality: QualityRow) -> str:
    write_model_card(
        folder, format="quantry", base_model="owner/vit", recipe=recipe, quality=quality, size=SIZE
    )
    return (folder / "README.md").read_text()


def test_figures_stand_in_the_units_of_their_metric(folder: Path) -> None:
    rows = (
        QualityRow(metric="top1", dataset="digits", samples=1000, fp=0.9754, rtn=None, quantized=0.9723),
        QualityRow(metric="kl", dataset="digits", samples=1000, fp=0.0, rtn=1.25, quantized=0.01234),
    )
    text = card(folder, (RtnStep(bits=4), RepqStep(bits=4)), *rows)
    assert "| top-1 accuracy | digits, 1,000 images | 97.54 % | – | 97.23 % |" in text
    assert "| KL divergence, nats | digits, 1,000 images | 0 | 1.25 | 0.01234 |" in text
    assert "windows" not in text


def test_a_classifier_is_loaded_as_one(folder: Path) -> None:
    text = card(folder, (RtnStep(bits=4), RepqStep(bits=4)))
    assert "pipeline_tag: image-classification" in text
    assert "tags: [quantized, quantry]" in text
    snippet = text.partition("```python\n")[2].partition("```")[0]
    lines = snippet.splitlines()
    assert lines[:2] == ["import quantry", "from transformers import AutoModelForImageClassification"]
    assert "AutoModelForImageClassification.from_pretrained(" in lines[2]
    assert "`quantry.load(folder)`" in text


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (UniformStep(bits=8, granularity="token"), "Uniform activations 8 bits, per token\n"),
        (Ptq4vitStep(bits=6), "PTQ4ViT 6 bits (Yuan et al. 2022, arXiv:2111.12293)"),
        (RepqStep(bits=4, softmax_bits=8), "RepQ-ViT 4 bits, softmax 8 bits (Li et al. 2023"),
        (AdalogStep(bits=4), "AdaLog 4 bits (Wu et al. 2024, arXiv:2407.12951)"),
        (IgqStep(bits=4, groups=12), "IGQ-ViT 4 bits, 12 groups (Moon et al. 2024"),
        (SoftmaxBiasStep(), "Softmax bias correction (Pandey et al. 2023, arXiv:2309.01729)"),
        (BiasCompensationStep(), "Bias compensation per channel (Gong et al. 2024, arXiv:2404.01892)"),
    ],
)
def test_each_step_is_said_with_its_paper(step: Step, said: str, folder: Path) -> None:
    assert f"2. {said}" in card(folder, (RtnStep(bits=4), step))


@pytest.mark.parametrize(("link", "kept"), [("https://example.org/licence", True), ("../LICENSE.txt", False)])
def test_the_licence_is_carried_over_without_links_that_lead_nowhere(
    folder: Path, tmp_path: Path, link: str, kept: bool
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text(
        f"---\nlicense: other\nlicense_name: mine\nlicense_link: {link}\n---\ntext\n"
    )
    write_model_card(folder, format="quantry", base_model="a/b", recipe=(RtnStep(bits=4),), source=source)
    front = (folder / "README.md").read_text().split("---")[1].splitlines()
    assert {"license: other", "license_name: mine"} <= set(front)
    assert (f"license_link: {link}" in front) is kept
