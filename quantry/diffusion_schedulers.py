"""The sampler of a diffusion job: its settings filled in, and its scheduler's config checked. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantry.base import SpecError
from quantry.contract import JobSpec
from quantry.diffusion import SCHEDULER_CONFIG, PipelineFamily
from quantry.sampling import Sampling

STEPS = 20  # of a trajectory, where the request says nothing
SCHEDULERS = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}
MAX_TRAINING_STEPS = 100_000
PREDICTIONS = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")  # of DDPM; DDIM has its own
_SPACINGS = ("linspace", "leading", "trailing")


def resolve_sampling(spec: JobSpec, family: PipelineFamily, config: Mapping[str, Any]) -> Sampling:
    """The sampler's settings, filled in. Raises SpecError for what has no linear step."""
    asked = spec.sampling or Sampling()
    if family.one_step:
        return _one_step(asked, config)
    kind = scheduler_class(asked, config)
    if kind not in SCHEDULERS.values():
        raise SpecError(
            "sampling.scheduler",
            f"{kind} has no linear step, which calibration along the trajectory needs: set `ddim` or `ddpm`",
        )
    limit = _training_steps(kind, config)
    if asked.eta and kind != SCHEDULERS["ddim"]:
        raise SpecError(
            "sampling.eta", f"{kind} has its own noise: leave eta out, or set scheduler to `ddim`"
        )
    if asked.eta and family.transformer:
        raise SpecError("sampling.eta", f"a {family.name} passes no eta on to its scheduler: leave it out")
    bent = [key for key, usual in (("clip_sample", True), ("thresholding", False)) if config.get(key, usual)]
    if bent and asked.clip_sample is None:
        raise SpecError(
            "sampling.clip_sample",
            f"{kind} has {bent[0]} on with the checkpoint's settings, which bends every step: set false to sample "
            "without and see in the report whether the model still samples well",
        )
    if asked.guidance_scale is not None and family.guidance is None:
        raise SpecError("sampling.guidance_scale", f"a {family.name} has no guidance: leave it out")
    steps = asked.steps or STEPS
    if steps > limit:
        raise SpecError("sampling.steps", f"{steps} steps, but the scheduler was trained with {limit}")
    return asked.model_copy(
        update={"steps": steps, "guidance_scale": asked.guidance_scale or family.guidance}
    )


def _one_step(asked: Sampling, config: Mapping[str, Any]) -> Sampling:
    """The settings of a consistency model. Raises SpecError for any that it has not."""
    kind = config.get("_class_name")
    if kind != "CMStochasticIterativeScheduler":
        raise SpecError(
            "model", f"a consistency model is sampled by a CMStochasticIterativeScheduler, not by a {kind}"
        )
    if asked.steps not in (None, 1):
        raise SpecError(
            "sampling.steps", "a consistency model is linear in its network only in one step: use 1"
        )
    for field in ("scheduler", "clip_sample", "guidance_scale", "group"):
        if getattr(asked, field) is not None:
            raise SpecError(f"sampling.{field}", "a consistency model has its own sampler: leave it out")
    if asked.eta:
        raise SpecError("sampling.eta", "the one step of a consistency model adds no noise: leave it out")
    _training_steps(kind, {**config, "prediction_type": "epsilon"})
    return asked.model_copy(update={"steps": 1})


def scheduler_class(sampling: Sampling, config: Mapping[str, Any]) -> str:
    """The class of the scheduler that samples."""
    return SCHEDULERS[sampling.scheduler] if sampling.scheduler else str(config.get("_class_name"))


def _training_steps(kind: str, config: Mapping[str, Any]) -> int:
    """How many timesteps a scheduler was trained with. Raises SpecError for settings that none of `kind` can have."""
    limit = config.get("num_train_timesteps", 1000)
    if type(limit) is not int or not 1 <= limit <= MAX_TRAINING_STEPS:
        raise _refusal("num_train_timesteps", limit, f"a whole number from 1 to {MAX_TRAINING_STEPS}")
    known: list[tuple[str, str, tuple[str, ...]]] = [
        ("prediction_type", "epsilon", PREDICTIONS),
        ("timestep_spacing", "leading", _SPACINGS),
    ]
    if kind == SCHEDULERS["ddpm"]:
        known.append(("variance_type", "fixed_small", VARIANCES))
    for key, usual, values in known:
        if config.get(key, usual) not in values:
            raise _refusal(key, config[key], " or ".join(map(repr, values)))
    own = config.get("_class_name")
    if own != kind and config.get("beta_schedule") is None and config.get("trained_betas") is None:
        raise SpecError(
            "sampling.scheduler",
            f"the checkpoint's {own} has no beta_schedule: the model was not trained to be sampled by a {kind}",
        )
    return limit


def _refusal(key: str, value: object, wanted: str) -> SpecError:
    return SpecError("model", f"scheduler/{SCHEDULER_CONFIG}: {key} is {value!r}, not {wanted}")
