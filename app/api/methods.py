"""The catalog of steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fastapi import Response

from app.api.deps import Reader
from app.api.router import Router
from quantry.contract import MethodInfo, MethodPage
from quantry.diffusion_planning import pipelines_taking
from quantry.families import FAMILIES
from quantry.planning import LANGUAGE_METHODS
from quantry.recipe import (
    ACTIVATION_METHODS,
    TRAINING_METHODS,
    WEIGHT_METHODS,
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
    SvdquantStep,
    UniformStep,
)
from quantry.training import FixedPointTrainingStep
from quantry.training_planning import TRAINED_FAMILIES
from quantry.vision import VISION_FAMILIES
from quantry.vision_planning import VISION_METHODS
from quantry.wording import METHODS as NAMES

router = Router(prefix="/v1/methods", tags=["methods"])


@dataclass(frozen=True)
class Entry:
    """What the catalog says of a step beyond its class and its name."""

    step: type[Step]
    title: str
    cost: Literal["none", "light", "medium", "heavy"]
    formats: tuple[str, ...] = ("quantry",)  # the only one with a place for every quantizer of activations


_WEIGHTS = ("compressed-tensors", "gptq", "gguf", "quantry", "onnx")
_STATIC = ("quantry", "onnx")
_ENTRIES = {
    "rtn": Entry(
        RtnStep, "Round to nearest: each weight to the nearest point of its grid", "light", _WEIGHTS
    ),
    "gptq": Entry(
        GptqStep,
        "GPTQ: round column by column, each error made good by the columns that follow",
        "heavy",
        _WEIGHTS,
    ),
    "adaround": Entry(
        AdaroundStep,
        "AdaRound: learn for each weight whether it is rounded down or up, block by block",
        "heavy",
    ),
    "svdquant": Entry(
        SvdquantStep, "SVDQuant: smoothing, a low-rank branch in 16 bits, the rest on a grid", "medium"
    ),
    "uniform": Entry(
        UniformStep, "Uniform activations: one evenly spaced grid a tensor, or one a token", "light", _STATIC
    ),
    "ptq4vit": Entry(
        Ptq4vitStep,
        "PTQ4ViT: twin uniform grids for softmax and GELU, scales searched under the Fisher metric",
        "heavy",
    ),
    "repq": Entry(
        RepqStep, "RepQ-ViT: channel scales after LayerNorm, folded into one; log grids for softmax", "light"
    ),
    "adalog": Entry(AdalogStep, "AdaLog: log grids of searched base for softmax and GELU outputs", "heavy"),
    "igq": Entry(
        IgqStep,
        "IGQ-ViT: each image sorts its channels and softmax rows into groups, a grid for each",
        "medium",
    ),
    "smoothquant": Entry(
        SmoothquantStep,
        "SmoothQuant: move activation outliers into the weights, then quantize both",
        "light",
        ("compressed-tensors", "quantry"),
    ),
    "bias_compensation": Entry(
        BiasCompensationStep,
        "Bias compensation: move the mean output error of each layer into its bias",
        "light",
        _WEIGHTS,
    ),
    "fixed_point_training": Entry(
        FixedPointTrainingStep,
        "Fixed-point training: low-bit weights, activations and gradients; the interval protects large gradients",
        "heavy",
    ),
    "softmax_bias": Entry(
        SoftmaxBiasStep,
        "Softmax bias correction: give attention probabilities the mass back that rounding takes",
        "light",
        _STATIC,
    ),
    "accuquant": Entry(
        AccuquantStep,
        "AccuQuant: train activation step sizes on where several denoising steps arrive",
        "heavy",
    ),
    "noise_correction": Entry(
        NoiseCorrectionStep, "Noise correction: a gain and a shift of the prediction for each step", "light"
    ),
}


def _families(method: str) -> Iterator[str]:
    """The `model_type`s and pipeline classes whose planner takes the step."""
    if method in LANGUAGE_METHODS:
        yield from sorted(FAMILIES)
    if method in VISION_METHODS:
        yield from sorted(VISION_FAMILIES)
    yield from pipelines_taking(method)
    if method in TRAINING_METHODS:
        yield from sorted(TRAINED_FAMILIES)


def _role(method: str) -> Literal["weights", "activations", "correction", "training"]:
    if method in TRAINING_METHODS:
        return "training"
    if method in WEIGHT_METHODS:
        return "weights"
    return "activations" if method in ACTIVATION_METHODS else "correction"


METHODS = MethodPage(
    items=tuple(
        MethodInfo(
            method=method,
            title=entry.title,
            role=_role(method),
            families=tuple(_families(method)),
            formats=entry.formats,
            cost=entry.cost,
            paper=NAMES[method].url,
            json_schema=entry.step.model_json_schema(),
        )
        for method, entry in _ENTRIES.items()
        if any(_families(method))  # else a step that no model can be given yet
    )
)
_CONTENT = METHODS.model_dump_json()


@router.get("", response_model=MethodPage)
def list_methods(caller: Reader) -> Response:
    """Each step that a recipe can have: its JSON Schema, model families, formats, cost and paper.

    Not every format fits every family and setting: an estimate says which one a job gets.
    """
    return Response(_CONTENT, media_type="application/json")
