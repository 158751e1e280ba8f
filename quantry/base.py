"""What every record of the contract is made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

FLOAT_BITS = 32  # of what is not quantized: biases, and arithmetic when operations are counted
Bits = Literal[2, 3, 4, 5, 6, 8]
# fmt: off
Metric = Literal[
    "perplexity", "top1", "top5", "kl",
    "latent_mse", "psnr", "ssim", "lpips", "frechet", "frechet_inception",
]
# fmt: on
Label = Annotated[
    str, StringConstraints(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
]
Name = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+$")]


class Model(BaseModel):
    """Base of every record of the contract: immutable, strict about its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class SpecError(ValueError):
    """A request that no job can be made of. `path` names the field, as in `recipe.1.granularity`."""

    def __init__(self, path: str, detail: str) -> None:
        super().__init__(f"{path}: {detail}")
        self.path = path
        self.detail = detail
