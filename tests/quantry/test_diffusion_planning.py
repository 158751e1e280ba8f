"""The dry run of jobs on pipelines: what is filled in, counted, and refused with its field."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from planned_pipelines import FOLDER, ROUND, SHORT, W4A8, outside, planned

from quantry.base import SpecError
from quantry.bundled import bundled_model
from quantry.diffusion import is_pipeline, read_components
from quantry.diffusion_costs import estimate_diffusion
from quantry.diffusion_layers import positions, quantized_layers
from quantry.diffusion_planning import plan_diffusion
from quantry.headers import HeaderError, TensorInfo, read_header
from quantry.planning import plan
from quantry.requests import JobRequest
from quantry.vision_planning import plan_vision


def test_the_short_form_is_w4a8_by_accuquant() -> None:
    plan = planned(SHORT)
    assert [step.method for step in plan.spec.recipe] == ["adaround", "uniform", "accuquant"]
    assert [getattr(step, "bits", None) for step in plan.spec.recipe] == [4, 8, None]
    assert plan.steps == 20
    assert plan.group == 5
    assert plan.spec.format == "quantry"
    evaluation = plan.spec.evaluation
    assert evaluation is not None
    assert evaluation.features is not None
    assert evaluation.features.id == "bundled/vit-tiny"
    assert evaluation.metrics == ("latent_mse", "psnr", "ssim", "frechet")
    assert planned({**SHORT, "correction": "noise_correction"}).spec.recipe[-1].method == "noise_correction"


def test_a_plan_that_is_stored_plans_to_itself() -> None:
    plan = planned(SHORT)
    index, components = outside()
    assert plan_diffusion(plan.spec, index, components).spec == plan.spec


def test_measures_of_the_operator_are_taken_where_they_are_named() -> None:
    metrics = ("lpips", "frechet_inception", "psnr")
    evaluation = planned({"recipe": ROUND, "evaluation": {"metrics": metrics}}).spec.evaluation
    assert evaluation is not None
    assert evaluation.metrics == metrics


def test_layers_bytes_and_bits_are_counted() -> None:
    plan = planned({"recipe": ROUND})
    weights = {layer.name for layer in plan.layers if layer.quantized}
    assert {"conv_in", "conv_out", "time_embedding.linear_1", "mid_block.attentions.0.to_q"} <= weights
    assert 4 < plan.effective_bits < 4.3
    assert plan.quantized_bytes < 0.35 * plan.fp_bytes  # of float16
    assert plan.copied_bytes == 0
    narrow = planned({"recipe": [{"method": "rtn", "bits": 4, "edge_bits": 4}]})
    assert narrow.effective_bits < plan.effective_bits


def test_estimates_grow_with_the_work() -> None:
    small = estimate_diffusion(planned({"recipe": W4A8}), threads=1, cuda=False)
    large = estimate_diffusion(planned({**SHORT, "sampling": {"steps": 100}}), threads=1, cuda=False)
    assert small.seconds_low < large.seconds_low < large.seconds_high
    assert small.peak_memory_bytes < large.peak_memory_bytes
    assert estimate_diffusion(planned(SHORT), threads=1, cuda=True).seconds_high < large.seconds_high


def test_a_layer_runs_at_the_places_of_its_level() -> None:
    _, components = outside()
    config = components["unet"].config
    shape = (1, 16, 16)
    found = {
        layer: positions(layer, config, shape)
        for layer in (
            "conv_in",
            "down_blocks.1.resnets.0.conv1",
            "mid_block.resnets.0.conv1",
            "up_blocks.0.resnets.0.conv1",
            "up_blocks.2.resnets.0.conv1",
            "time_embedding.linear_1",
            "down_blocks.0.resnets.0.time_emb_proj",
        )
    }
    assert list(found.values()) == [256, 64, 16, 16, 256, 1, 1]
    assert positions("transformer_blocks.0.ff.net.2", {"patch_size": 2}, shape) == 64


def test_pipelines_are_told_from_single_models() -> None:
    index, components = outside()
    assert is_pipeline(index)
    assert not is_pipeline(components["unet"].config)
    assert not is_pipeline({"model_type": "opt"})


def test_folders_with_parts_missing_are_refused() -> None:
    index, _ = outside()
    config = (FOLDER / "unet" / "config.json").read_bytes()
    read = {"unet/config.json": config, "scheduler/scheduler_config.json": b"{}"}
    with pytest.raises(HeaderError, match="`unet` has no safetensors weights"):
        read_components(index, set(read), read.__getitem__, lambda name: {})
    weights = {"unet/diffusion_pytorch_model.safetensors": b"", "unet/config.json": config}
    with pytest.raises(HeaderError, match="there is no folder scheduler"):
        read_components(index, set(weights), weights.__getitem__, lambda name: {})
    shards = {
        **read,
        "unet/diffusion_pytorch_model.safetensors.index.json": b'{"weight_map": {"a": "../b.safetensors"}}',
    }
    with pytest.raises(HeaderError, match="which is not beside it"):
        read_components(index, set(shards), shards.__getitem__, lambda name: {})


def test_embeddings_are_kept() -> None:
    tensors = {
        "conv_in.weight": TensorInfo("F32", (4, 1, 3, 3)),
        "class_embedding.weight": TensorInfo("F32", (10, 8)),
        "conv_in.bias": TensorInfo("F32", (4,)),
        "norm.weight": TensorInfo("F32", (4,)),
    }
    assert list(quantized_layers(tensors)) == ["conv_in"]
    with pytest.raises(SpecError, match="is empty: its shape"):
        quantized_layers({"conv_in.weight": TensorInfo("F32", (0, 1, 3, 3))})
    with pytest.raises(SpecError, match="I8"):
        quantized_layers({"conv_in.weight": TensorInfo("I8", (4, 1, 3, 3))})


@pytest.mark.parametrize(
    "body",
    [
        {"sampling": {"steps": 5}},
        {"evaluation": {"features": {"source": "bundled", "id": "bundled/vit-tiny"}}},
        {"recipe": [{"method": "rtn", "bits": 4, "edge_bits": 8}]},
        {"recipe": [{"method": "adaround", "bits": 4}]},
    ],
)
@pytest.mark.parametrize("model", ["bundled/opt-tiny", "bundled/vit-tiny"])
def test_other_models_refuse_what_only_sampling_has(model: str, body: dict[str, Any]) -> None:
    folder = bundled_model(model)
    config = json.loads((folder / "config.json").read_text())
    spec = JobRequest.model_validate({"model": model, "recipe": ROUND, **body}).resolve()
    make = plan_vision if "vit" in model else plan
    with pytest.raises(SpecError):
        make(spec, config, read_header(folder / "model.safetensors"))


def test_planning_needs_no_torch() -> None:
    code = "import sys, quantry.diffusion_planning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
