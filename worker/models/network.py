"""What the block sweep needs of a model, whatever its family: a list of blocks that run one by one."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from worker.models.calls import BlockCall


class Network(Protocol):
    """Both adapters are one. A layer's full name is `join(prefix(index), its name in the block)`."""

    device: torch.device
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """How many blocks there are."""

    def prefix(self, index: int) -> str:
        """What stands before the names of block `index`'s layers."""

    def groups(self, index: int) -> tuple[tuple[str, ...], ...]:
        """The layers of a block in the order they run; the layers of one group share their input."""

    def block(self, index: int) -> nn.Module:
        """Block `index` in full precision, its own copy."""

    def embed(self, inputs: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """What enters the first block for a batch of inputs, and the call of every block."""

    def batch(self, inputs: Tensor) -> int:
        """How many inputs run together."""

    def columns(self, name: str) -> int: ...

    def weight(self, name: str) -> Tensor:
        """(out, in) float32."""

    def bias(self, name: str) -> Tensor | None: ...

    @property
    def halves(self) -> tuple[str, str, str] | None:
        """Of blocks that compute mid = x + attention(norm(x)) and mid + mlp(norm(mid)): the first norm, the attention
        and the second norm, by name inside the block. None for other blocks."""

    def attention(self, index: int) -> str | None:
        """The attention module inside a block; None where it has none."""

    def units(self, index: int) -> dict[str, tuple[str, str]]:
        """`attention` and `mlp` where the block has them as modules: the module, and its last layer."""

    def output_layer(self, index: int) -> str | None:
        """The layer into which a bias on the block's output merges."""

    def use_kept(self, *, as_stored: bool) -> None:
        """Tensors that are not quantized: as the artifact stores them, or as the checkpoint has them."""


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def linears(network: Network, index: int) -> tuple[str, ...]:
    """Every quantized layer of a block, in the order they run."""
    return tuple(name for group in network.groups(index) for name in group)


def as_tokens(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's input as (windows, positions, columns): a convolution's patches, a pooled vector's one token."""
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        patches = nn.functional.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)
        return patches.transpose(1, 2)
    return x if x.ndim == 3 else x.unsqueeze(-2)


def channels_last(layer: nn.Module, y: Tensor) -> Tensor:
    """A layer's output as (..., out)."""
    return y.flatten(2).transpose(1, 2) if isinstance(layer, nn.Conv2d) else y
