"""What `POST /v1/jobs` takes: a short form that names a method, or a recipe of steps; and its full form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from quantry.base import Bits, Label, Model, Name, SpecError
from quantry.contract import Accept, Calibration, Evaluation, Format, JobSpec, Limits, ModelRef
from quantry.recipe import (
    AccuquantStep,
    AdalogStep,
    AdaroundStep,
    BiasCompensationStep,
    GptqStep,
    IgqStep,
    NoiseCorrectionStep,
    Ptq4vitStep,
    RepqStep,
    RtnStep,
    SmoothquantStep,
    SoftmaxBiasStep,
    Step,
    TrainingStep,
    UniformStep,
)
from quantry.sampling import Sampling
from quantry.unused import check_unused


class JobRequest(Model):
    """What `POST /v1/jobs` takes: the short form (`bits`, `method`, `correction`) or a full `recipe`."""

    model: Name | ModelRef = Field(description="a name such as `bundled/opt-tiny`, or the full reference")
    bits: Bits | None = None
    method: (
        Literal[
            "rtn",
            "gptq",
            "adaround",
            "uniform",
            "ptq4vit",
            "repq",
            "adalog",
            "igq",
            "smoothquant",
            "softmax_bias",
            "accuquant",
            "fixed_point_training",
        ]
        | None
    ) = Field(
        None,
        description="null: gptq; a method for activations brings its own weight step, accuquant `adaround` and "
        "activations of 8 bits",
    )
    correction: Literal["bias_compensation", "softmax_bias", "noise_correction"] | None = None
    group_size: int | None = Field(None, ge=2, le=65536)
    symmetric: bool | None = None
    recipe: tuple[Step, ...] | None = Field(None, min_length=1, max_length=8)
    calibration: Calibration = Calibration()
    evaluation: Evaluation | None = Evaluation()
    sampling: Sampling | None = None
    format: Format = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    accept: Accept = Accept()
    limits: Limits = Limits()
    labels: dict[Label, Label] = Field({}, max_length=32)

    def resolve(self) -> JobSpec:
        """The full form. Raises SpecError, naming the field."""
        self._check_training()
        short = {"bits", "method", "correction", "group_size", "symmetric"}
        rest = {name: getattr(self, name) for name in type(self).model_fields if name not in short}
        try:
            model = ModelRef.parse(self.model) if isinstance(self.model, str) else self.model
        except ValidationError as error:
            raise SpecError("model", f"{self.model!r}: {_spec_error(error)}") from error
        try:
            spec = JobSpec(**{**rest, "model": model, "recipe": self.recipe or self._recipe()})
        except ValidationError as error:
            raise _spec_error(error) from error
        check_unused(spec)
        return spec

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        named = [
            n
            for n in ("bits", "method", "correction", "group_size", "symmetric")
            if n in self.model_fields_set
        ]
        if self.recipe is not None and named:
            raise ValueError(f"`recipe` is the full form: leave out {', '.join(f'`{n}`' for n in named)}")
        if self.recipe is None and self.bits is None:
            raise ValueError("give `bits` (with `method` and `correction`), or a `recipe`")
        return self

    def _check_training(self) -> None:
        """Refuse what a job that trains would not look at. Raises SpecError."""
        short = self.method == "fixed_point_training"
        if short:
            for name in ("correction", "group_size", "symmetric"):
                if getattr(self, name) is not None:
                    raise SpecError(
                        name, "fixed_point_training learns one symmetric grid a layer: leave this out"
                    )
        trains = short or any(isinstance(step, TrainingStep) for step in self.recipe or ())
        if trains and "samples" in self.calibration.model_fields_set:
            raise SpecError(
                "calibration.samples",
                "training takes every image of the dataset: leave this out, or set `samples` of the recipe's step",
            )

    def _recipe(self) -> tuple[Step, ...]:
        assert self.bits is not None  # _one_form
        method = self.method or "gptq"
        if method in ("adaround", "accuquant"):
            return self._along_trajectories(method)
        if method == "fixed_point_training":
            return (TrainingStep(bits=self.bits),)
        symmetric = self.symmetric if self.symmetric is not None else self.format != "gptq"
        grid: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size, "symmetric": symmetric}
        steps: list[Step] = []
        if method == "rtn":
            steps.append(RtnStep(**grid))
        elif method in ("ptq4vit", "repq", "adalog", "igq"):  # as published: no error feedback
            steps.append(RtnStep(**grid, clip="mse"))
        else:
            steps.append(GptqStep(**grid))
        if method in _SHORT_STEPS:
            steps.append(_SHORT_STEPS[method](bits=self.bits))
        return (*steps, *self._corrections(method))

    def _along_trajectories(self, method: str) -> tuple[Step, ...]:
        """AdaRound, alone or with activations of 8 bits whose step sizes AccuQuant trains."""
        assert self.bits is not None  # _one_form
        weights = AdaroundStep(bits=self.bits, group_size=self.group_size, symmetric=bool(self.symmetric))
        trained = (UniformStep(bits=8, range="mse"), AccuquantStep()) if method == "accuquant" else ()
        return (weights, *trained, *self._corrections(method))

    def _corrections(self, method: str) -> tuple[Step, ...]:
        """The correction of the short form, unless the method is that already."""
        if self.correction is None or self.correction == method:
            return ()
        return (_CORRECTIONS[self.correction](),)


_CORRECTIONS: dict[str, Callable[[], Step]] = {
    "bias_compensation": BiasCompensationStep,
    "softmax_bias": SoftmaxBiasStep,
    "noise_correction": NoiseCorrectionStep,
}
_SHORT_STEPS: dict[str, Callable[..., Step]] = {
    "uniform": UniformStep,
    "ptq4vit": Ptq4vitStep,
    "repq": RepqStep,
    "adalog": AdalogStep,
    "igq": IgqStep,
    "smoothquant": SmoothquantStep,
    "softmax_bias": lambda bits: SoftmaxBiasStep(),
}


def _spec_error(error: ValidationError) -> SpecError:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, SpecError):
        return cause
    path = ".".join(str(part) for part in first["loc"]) or "body"
    return SpecError(path, first["msg"])
