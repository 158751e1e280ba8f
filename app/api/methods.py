"""The catalog of steps."""

from __future__ import annotations

from fastapi import Response

from app.api.deps import Reader
from app.api.router import Router
from quantry.contract import (
    BiasCompensationStep,
    GptqStep,
    MethodInfo,
    MethodPage,
    RtnStep,
)
from quantry.families import FAMILIES

router = Router(prefix="/v1/methods", tags=["methods"])

_FAMILIES = tuple(sorted(FAMILIES))
_FORMATS = ("compressed-tensors", "gptq", "gguf", "quantry")

METHODS = MethodPage(
    items=(
        MethodInfo(
            method="rtn",
            title="Round to nearest: each weight to the nearest point of its grid",
            role="weights",
            families=_FAMILIES,
            formats=_FORMATS,
            cost="light",
            paper=None,
            json_schema=RtnStep.model_json_schema(),
        ),
        MethodInfo(
            method="gptq",
            title="GPTQ: round column by column, each error made good by the columns that follow",
            role="weights",
            families=_FAMILIES,
            formats=_FORMATS,
            cost="heavy",
            paper="https://arxiv.org/abs/2210.17323",
            json_schema=GptqStep.model_json_schema(),
        ),
        MethodInfo(
            method="bias_compensation",
            title="Bias compensation: move the mean output error of each layer into its bias",
            role="correction",
            families=_FAMILIES,
            formats=_FORMATS,
            cost="light",
            paper="https://arxiv.org/abs/2404.01892",
            json_schema=BiasCompensationStep.model_json_schema(),
        ),
    )
)
_CONTENT = METHODS.model_dump_json()


@router.get("", response_model=MethodPage)
def list_methods(caller: Reader) -> Response:
    """Each step that a recipe can have: its JSON Schema, model families, formats, cost and paper.

    Not every format fits every family and setting: an estimate says which one a job gets.
    """
    return Response(_CONTENT, media_type="application/json")
