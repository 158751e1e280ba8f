"""Quantizers of activations: modules that move a tensor to the nearest points of a grid.

Everything that a quantizer needs to run is in its description (plain JSON) and its buffers, so that a
checkpoint holds the whole of it. `KINDS` maps the `kind` of a description to its class.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from quantry.base import FLOAT_BITS


class ActivationQuantizer(nn.Module):
    """Base of all kinds. `bits`: of a code. Subclasses register their buffers and implement `forward`.

    The arguments of a subclass's __init__ after `bits` are JSON values, kept as attributes of the same
    names and listed in `fields`; its buffers are made with the right shapes and filled later.
    """

    kind: ClassVar[str]
    fields: ClassVar[tuple[str, ...]] = ()

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            KINDS[cls.kind] = cls

    def describe(self) -> dict[str, Any]:
        """What `from_description` makes an empty quantizer of the same kind and shape from."""
        return {"kind": self.kind, "bits": self.bits} | {name: getattr(self, name) for name in self.fields}

    def fill(self, **buffers: Tensor) -> Self:
        """Set buffers by name; shapes must agree."""
        for name, value in buffers.items():
            self.get_buffer(name).copy_(value)
        return self

    def operations(self, shape: tuple[int, ...]) -> int:
        """Bit operations that finding the parameters of a tensor of this shape takes at run time; 0 if static."""
        return 0

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.describe().items())


KINDS: dict[str, type[ActivationQuantizer]] = {}


def from_description(description: dict[str, Any]) -> ActivationQuantizer:
    """An empty quantizer. Raises ValueError for a kind that this version does not know."""
    known = dict(description)
    kind = known.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"activation quantizer {kind!r} is not known; known: {', '.join(sorted(KINDS))}")
    return KINDS[kind](**known)


class UniformQuantizer(ActivationQuantizer):
    """x ~ scale * (q - zero_point), q in [0, 2**bits - 1]: static and asymmetric.

    shape: of scale and zero_point, float32, broadcast against the tensor: [] per tensor, [H, 1, 1] per head
    of (batch, heads, tokens, width), [C] per channel.
    """

    kind = "uniform"
    fields = ("shape",)

    def __init__(self, bits: int, shape: list[int]) -> None:
        super().__init__(bits)
        self.shape = list(shape)
        self.register_buffer("scale", torch.ones(self.shape))
        self.register_buffer("zero_point", torch.zeros(self.shape))

    scale: Tensor
    zero_point: Tensor

    @classmethod
    def covering(cls, low: Tensor, high: Tensor, bits: int) -> UniformQuantizer:
        """The grid over [low, high], widened to hold 0 so that zero stays exact."""
        low, high = low.float().clamp(max=0), high.float().clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny * 2**bits)
        zero_point = (-low / scale).round().clamp(0, 2**bits - 1)
        return cls(bits, list(low.shape)).to(low.device).fill(scale=scale, zero_point=zero_point)

    def forward(self, x: Tensor) -> Tensor:
        q = (x.float() / self.scale + self.zero_point).round_().clamp_(0, 2**self.bits - 1)
        return ((q - self.zero_point) * self.scale).to(x.dtype)


class TokenQuantizer(ActivationQuantizer):
    """A grid for each token, from the token's own range, found when it runs: nothing is stored.

    symmetric: scale = max|x| / (2**(bits-1) - 1/2), as compressed-tensors computes it; else the range
    [min, max] with 0.
    """

    kind = "token"
    fields = ("symmetric",)

    def __init__(self, bits: int, symmetric: bool = False) -> None:
        super().__init__(bits)
        self.symmetric = symmetric

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        if self.symmetric:
            half = 2 ** (self.bits - 1)
            scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-30) / (half - 0.5)
            q: Tensor = (values / scale).round_().clamp_(-half, half - 1)
            return q.mul_(scale).to(x.dtype)
        low = values.amin(-1, keepdim=True).clamp(max=0)
        high = values.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / (2**self.bits - 1)).clamp(min=1e-30)
        zero = (-low / scale).round_()
        codes: Tensor = (values / scale + zero).round_().clamp_(0, 2**self.bits - 1)
        return codes.sub_(zero).mul_(scale).to(x.dtype)

    def operations(self, shape: tuple[int, ...]) -> int:
        """A comparison of 32 bits for each value, or two where both ends of the range are looked for."""
        return (1 if self.symmetric else 2) * FLOAT_BITS * torch.Size(shape).numel()
