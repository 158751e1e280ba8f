"""Which layers take the biases of bias compensation, by the levels that a recipe names. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quantry.base import SpecError
from quantry.families import Family, block_bias_layer, units_of
from quantry.recipe import BiasCompensationStep, Level

_ATTENTION = r"(self_attn\.(o|out)_proj|attn\.c_proj|attention\.(o_proj|dense))$"
_MLP = r"(fc2|mlp\.(down_proj|c_proj|dense_4h_to_h))$"
_LAST: dict[Level, re.Pattern[str]] = {  # the last layer of what a level names
    "module": re.compile(""),
    "products": re.compile("(?!)"),  # they are no layers
    "attention": re.compile(_ATTENTION),
    "mlp": re.compile(_MLP),
    "block": re.compile(_MLP),
    "model": re.compile("^classifier$"),
}


def is_compensated(step: BiasCompensationStep, layer: str) -> bool:
    """Whether a layer (its name, without `.weight`) is given a bias by one of the levels."""
    return any(_LAST[level].search(layer) for level in step.chosen_levels)


def check_levels(path: str, step: BiasCompensationStep, family: Family, config: Mapping[str, Any]) -> None:
    """That a bias at each level has a layer of the language model to merge into. Raises SpecError at `path`."""
    for level in step.levels or ():
        if level == "products":
            raise SpecError(
                path, "`products` is a bias for each pair of tokens, and a text has any number: leave it out"
            )
        if level == "model":
            raise SpecError(
                path, "`model` is a bias on the logits, and the head of a language model is not quantized"
            )
        if level in ("attention", "mlp") and level not in units_of(family):
            raise SpecError(path, f"the {level} of {family.model_type} is no module: use `module` or `block`")
        if level == "block" and block_bias_layer(family, config) is None:
            raise SpecError(
                path, f"a norm follows the last layer of a {family.model_type} block: leave `block` out"
            )


def check_classifier_levels(path: str, step: BiasCompensationStep, model_type: str) -> None:
    """The same of a classifier."""
    published = step.targets == "published" and step.granularity == "position_channel"
    if "products" in (step.levels or ()) and not published:
        raise SpecError(
            path,
            "`products` has a bias for each position, found on float inputs: set granularity to `position_channel` and "
            "targets to `published`, or leave it out",
        )
    if model_type == "dinov2" and "block" in (step.levels or ()):
        raise SpecError(
            path,
            "a layer scale follows the last layer of a DINOv2 block, so its bias has no layer: leave `block` out",
        )
