"""Jobs on pipelines that are refused at submit, each with the field that is at fault."""

from __future__ import annotations

from typing import Any

import pytest
from planned_pipelines import ROUND, W4A8, outside, planned

from quantry.base import SpecError
from quantry.diffusion import Component, pipeline_family_of
from quantry.diffusion_planning import DiffusionPlan, plan_diffusion
from quantry.requests import JobRequest


def test_noise_is_absorbed_where_the_sampler_adds_some() -> None:
    recipe = [*ROUND, {"method": "noise_correction", "absorb": True}]
    for sampling in ({"eta": 0.5}, {"scheduler": "ddpm"}):
        planned({"recipe": recipe, "sampling": sampling})
    with pytest.raises(ValueError, match="`absorb` is a part of ptqd"):
        planned({"recipe": [*ROUND, {"method": "noise_correction", "rule": "tac", "absorb": True}]})


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"recipe": [{"method": "gptq", "bits": 4}]}, "recipe.0", "Hessian"),
    ({"recipe": [*ROUND, {"method": "smoothquant"}]}, "recipe.1", "does not work on diffusion"),
    ({"recipe": [{"method": "rtn", "bits": 4, "group_size": 32}]}, "recipe.0.group_size", "one scale a row"),
    (
        {"recipe": [*ROUND, {"method": "bias_compensation", "levels": ["module", "block"]}]},
        "recipe.1.levels",
        "use `module`",
    ),
    ({"recipe": [{"method": "rtn", "bits": 4, "clip": "percentile"}]}, "recipe.0.clip", "none"),
    ({"recipe": [*ROUND, {"method": "uniform", "bits": 8, "range": "percentile"}]}, "recipe.1.range", "mse"),
    (
        {"recipe": [*ROUND, {"method": "uniform", "bits": 8, "granularity": "token"}]},
        "recipe.1.granularity",
        "tensor",
    ),
    ({"recipe": [*W4A8, {"method": "accuquant", "group": 30}]}, "recipe.2.group", "trajectory has 20"),
    (
        {"recipe": [*W4A8, {"method": "accuquant", "per_group": False, "start": "progressive"}]},
        "recipe.2.start",
        "per_group",
    ),
    (
        {"recipe": [*W4A8, {"method": "accuquant"}], "sampling": {"group": 4}},
        "sampling.group",
        "5 steps each",
    ),
    ({"recipe": W4A8, "sampling": {"group": 21}}, "sampling.group", "20 in all"),
    ({"recipe": W4A8, "sampling": {"scheduler": "ddpm", "eta": 0.5}}, "sampling.eta", "its own noise"),
    ({"recipe": W4A8, "sampling": {"guidance_scale": 3}}, "sampling.guidance_scale", "no guidance"),
    (
        {"recipe": [*ROUND, {"method": "noise_correction", "absorb": True}]},
        "recipe.1.absorb",
        "adds no noise that could be less",
    ),
    ({"recipe": W4A8, "format": "gptq"}, "format", "weights only|no place"),
    ({"recipe": W4A8, "compute_dtype": "bfloat16"}, "compute_dtype", "float32"),
    ({"recipe": W4A8, "accept": {"accuracy_drop_max": 0.1}}, "accept.accuracy_drop_max", "no accuracy"),
    ({"recipe": W4A8, "calibration": {"sequence_length": 64}}, "calibration.sequence_length", "tokens"),
    (
        {"recipe": W4A8, "calibration": {"dataset": {"source": "bundled", "id": "bundled/digits"}}},
        "calibration.dataset",
        "its own samples",
    ),
    ({"recipe": W4A8, "evaluation": {"metrics": ["perplexity"]}}, "evaluation.metrics", "no perplexity"),
    ({"recipe": W4A8, "evaluation": {"baselines": ["rtn"]}}, "evaluation.baselines", "full precision"),
    ({"recipe": W4A8, "evaluation": {"samples": 1}}, "evaluation.samples", "at least 2"),
    (
        {"recipe": W4A8, "evaluation": {"samples": 1, "metrics": ["frechet_inception"]}},
        "evaluation.samples",
        "at least 2",
    ),
    (
        {"recipe": [*ROUND, {"method": "bias_compensation", "granularity": "position_channel"}]},
        "recipe.1.granularity",
        "channel",
    ),
]


@pytest.mark.parametrize(("body", "path", "reason"), REFUSED)
def test_what_cannot_work_is_refused_with_its_field(body: dict[str, Any], path: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason) as refused:
        planned(body)
    assert refused.value.path == path


@pytest.mark.parametrize(
    ("configs", "path", "reason"),
    [
        (
            {"scheduler": {"_class_name": "PNDMScheduler"}},
            "sampling.scheduler",
            "PNDMScheduler has no linear step",
        ),
        ({"scheduler": {"clip_sample": True}}, "sampling.clip_sample", "clip_sample on"),
        ({"scheduler": {"thresholding": True}}, "sampling.clip_sample", "thresholding on"),
        ({"scheduler": {"num_train_timesteps": 10}}, "sampling.steps", "trained with 10"),
        ({"unet": {"sample_size": 18}}, "model", "18 is not a multiple of 4"),
        ({"unet": {"sample_size": None}}, "model", "sample_size None"),
        ({"unet": {"out_channels": 2}}, "model", "predict a variance"),
        ({"unet": {"num_class_embeds": 10}}, "model", "class-conditional"),
        ({"unet": {"quantization_config": {"a": 1}}}, "model", "already quantized"),
        ({"unet": {"_class_name": "UNet1DModel"}}, "model", "is of a UNet1DModel"),
        (
            {"unet": {"block_out_channels": 8}},
            "model",
            "block_out_channels must be a list of at most 12 widths",
        ),
        ({"unet": {"patch_size": "x"}}, "model", "patch_size is 'x'"),
        ({"unet": {"time_cond_proj_dim": 8}}, "model", "time_cond_proj_dim is 8"),
        ({"unet": {"addition_embed_type": "text_time"}}, "model", "is run without"),
        ({"scheduler": {"num_train_timesteps": "100"}}, "model", "num_train_timesteps is '100'"),
        ({"scheduler": {"num_train_timesteps": 0}}, "model", "num_train_timesteps is 0"),
        ({"scheduler": {"num_train_timesteps": 10**9}}, "model", "from 1 to 100000"),
        ({"scheduler": {"timestep_spacing": "odd"}}, "model", "'linspace' or 'leading' or 'trailing'"),
        ({"scheduler": {"prediction_type": "flow_prediction"}}, "model", "'flow_prediction', not 'epsilon'"),
        (
            {"scheduler": {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}},
            "model",
            "variance_type is 'learned_range'",
        ),
    ],
)
def test_what_a_pipeline_cannot_is_refused(configs: dict[str, Any], path: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason) as refused:
        planned({"recipe": W4A8}, **configs)
    assert refused.value.path == path


def test_clipping_is_left_out_where_the_request_says_so() -> None:
    plan = planned({"recipe": W4A8, "sampling": {"clip_sample": False}}, scheduler={"clip_sample": True})
    assert any("without clipping" in text for text in plan.warnings)
    assert (
        planned(
            {"recipe": W4A8, "sampling": {"scheduler": "ddim"}}, scheduler={"_class_name": "PNDMScheduler"}
        ).scheduler
        == "DDIMScheduler"
    )


def test_the_variance_that_ddpm_would_learn_does_not_matter_to_ddim() -> None:
    """Configs of DPM-Solver hold null there."""
    other = {"_class_name": "DPMSolverMultistepScheduler", "variance_type": None}
    body = {"recipe": W4A8, "sampling": {"scheduler": "ddim"}}
    assert planned(body, scheduler=other).scheduler == "DDIMScheduler"


def test_a_model_of_another_noise_schedule_is_not_sampled_by_ddim() -> None:
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "beta_schedule": None}
    with pytest.raises(SpecError, match="FlowMatchEulerDiscreteScheduler has no beta_schedule"):
        planned({"recipe": W4A8, "sampling": {"scheduler": "ddim"}}, scheduler=flow)


DIT = {"sample_size": 4, "in_channels": 4, "out_channels": 8, "patch_size": 2, "num_embeds_ada_norm": 1000}


def planned_dit(**changes: Any) -> DiffusionPlan:
    """The plan of a DiT with this config, by guidance unless `guidance_scale` is 1."""
    _, components = outside()
    scale = changes.pop("guidance_scale", None)
    spec = JobRequest.model_validate(
        {"model": "local:dit", "recipe": ROUND, "sampling": {"guidance_scale": scale}}
    ).resolve()
    index = {
        "_class_name": "DiTPipeline",
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    denoiser = Component({**DIT, **changes}, components["unet"].tensors)
    return plan_diffusion(
        spec, index, {"transformer": denoiser, "scheduler": components["scheduler"], "vae": Component({})}
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sample_size": 5}, "not a multiple of patch_size 2"),
        ({"sample_size": [4, 8]}, "samples squares only"),
        ({"out_channels": None}, "out_channels is None"),
        ({"num_embeds_ada_norm": 10}, "asks for no class by the label 1000, and this network has 10 labels"),
    ],
)
def test_a_dit_that_its_pipeline_would_not_run_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        planned_dit(**changes)
    assert planned_dit().sampling.guidance_scale == 4


def test_a_dit_of_few_classes_goes_without_guidance() -> None:
    assert planned_dit(num_embeds_ada_norm=10, guidance_scale=1).sampling.guidance_scale == 1


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"_class_name": ["DDIMPipeline"]}, "is not supported"),
        ({"_class_name": "FluxPipeline"}, "FluxPipeline.*supported: "),
        ({"extra": ["diffusers", "UNet2DModel"]}, "component `extra`"),
        ({"unet": ["mine", "UNet2DModel"]}, "takes `unet` from 'mine'"),
        ({"unet": ["diffusers", "UNet2DConditionModel"]}, "must be a UNet2DModel"),
        ({"scheduler": [None, None]}, "names no `scheduler`"),
        ({"_class_name": "LDMPipeline"}, "names no `vqvae`"),
    ],
)
def test_other_pipelines_and_components_are_refused(index: dict[str, Any], reason: str) -> None:
    known, _ = outside()
    with pytest.raises(SpecError, match=reason):
        pipeline_family_of({**known, **index})
