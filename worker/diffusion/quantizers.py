"""Activation quantizers whose grid depends on the step, and whose step size can be trained.

x ~ scale * (clip(round(x / scale) + zero_point, 0, 2**bits - 1) - zero_point), with the gradient of Esser et al.,
"Learned Step Size Quantization", 2020, arXiv:1902.08153. A grid a time step for what depends on nothing else:
Huang et al., "TFMQ-DM", 2024, arXiv:2311.16503.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantry.layers.operands import ROLES, attach, attached
from quantry.quantizers.steps import StepDependent, StepTable, channel_halves
from worker.diffusion.conditions import Predict, Seeds, Unconditional
from worker.diffusion.steps import Step

SMALLEST = 1e-8  # of a step size: what is always 0 needs none


class StepQuantizer(nn.Module):
    """A table of per-tensor grids: a row for every `steps_per_row` steps, a column for each half of the channels.

    scale: (rows, halves) float32, held as its logarithm, so that it stays positive and a learning rate is
    relative. zero_point: (rows, halves) float32, integers. `index` is the present step. split: channels of the
    halves of a tensor (batch, channels, ...). learned: whether calibration trains the step sizes.
    """

    def __init__(
        self,
        bits: int,
        scale: Tensor,
        zero_point: Tensor,
        *,
        steps_per_row: int,
        split: tuple[int, int] | None = None,
        learned: bool = True,
    ) -> None:
        super().__init__()
        assert scale.shape == zero_point.shape == (len(scale), 1 if split is None else 2)
        self.bits, self.steps_per_row, self.split, self.learned = bits, steps_per_row, split, learned
        self.log_scale = nn.Parameter(scale.float().clamp(min=SMALLEST).log(), requires_grad=False)
        self.register_buffer("zero_point", zero_point.float())
        self.index = 0

    zero_point: Tensor

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()

    def forward(self, x: Tensor) -> Tensor:
        row = self.index // self.steps_per_row
        dtype = torch.promote_types(x.dtype, torch.float32)
        scale, zero = self.log_scale[row].to(dtype).exp(), self.zero_point[row].to(dtype)
        parts = channel_halves(x, self.split)
        moved = [
            fake_quantize(part.to(dtype), scale[half], zero[half], self.bits).to(x.dtype)
            for half, part in enumerate(parts)
        ]
        return moved[0] if len(moved) == 1 else torch.cat(moved, dim=1)

    def frozen(self) -> StepTable:
        """The same grids as an artifact holds them, without anything to train."""
        rows, split = len(self.zero_point), None if self.split is None else list(self.split)
        table = StepTable(self.bits, rows, self.steps_per_row, split).to(self.zero_point.device)
        return table.fill(scale=self.scale.detach(), zero_point=self.zero_point)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, rows={len(self.zero_point)}, split={self.split}"


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """The nearest grid point of every value, in x's shape; scale and zero_point () in x's dtype. Differentiable."""
    moved: Tensor = _FakeQuantize.apply(x, scale, zero_point, 2**bits - 1)  # type: ignore[no-untyped-call]
    return moved


class _FakeQuantize(torch.autograd.Function):
    """The nearest point of a grid, in x's shape. Keeps x and nothing else for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, qmax: int) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.qmax = qmax
        return (x / scale).round_().add_(zero).clamp_(0, qmax).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        x, scale, zero = ctx.saved_tensors
        steps = x / scale
        nearest = steps.round()
        code = nearest + zero
        inside = (code >= 0) & (code <= ctx.qmax)
        by_scale = None
        if ctx.needs_input_grad[1]:
            change = torch.where(inside, nearest - steps, code.clamp_(0, ctx.qmax) - zero)
            by_scale = (grad * change).sum()
        return grad * inside if ctx.needs_input_grad[0] else None, by_scale, None, None


class StepNetwork:
    """A network as a denoiser: tells the network its timestep, and what depends on it the step.

    predict: what the pipeline does around it. seeds: of the samples of a batch, where that depends on them.
    quantizers: of the layers' inputs, by layer, and of operands of attention, by operand. Weights and quantizers may
    change at any time; quantizers attached afterwards are not told the step.
    """

    def __init__(
        self, unet: Any, steps: tuple[Step, ...], predict: Predict | None = None, seeds: Seeds = ()
    ) -> None:
        self.unet = unet
        self.steps = steps
        self.predict: Predict = predict or Unconditional()
        self.seeds = seeds
        self.quantizers: dict[str, StepQuantizer | StepTable] = {
            name.removesuffix(".input"): quantizer
            for name, quantizer in attached(unet)
            if isinstance(quantizer, StepQuantizer | StepTable)
        }
        self._dependents = [m for m in unet.modules() if isinstance(m, StepQuantizer | StepDependent)]

    def tell(self, index: int) -> None:
        """Let everything that depends on the step know which it is."""
        for module in self._dependents:
            module.index = index

    def __call__(self, x: Tensor, index: int) -> Tensor:
        self.tell(index)
        step = self.steps[index]
        return self.predict(self.unet, x if step.scale == 1 else step.scale * x, step.timestep, self.seeds)

    def of(self, seeds: Seeds) -> StepNetwork:
        """The same network, for batches of these samples."""
        bound = copy.copy(self)
        bound.seeds = seeds
        return bound

    def on(self, unet: Any) -> StepNetwork:
        """The same steps and conditions on another network, or on this one after quantizers were attached."""
        return StepNetwork(unet, self.steps, self.predict)


def attach_quantizers(unet: nn.Module, quantizers: Mapping[str, StepQuantizer]) -> None:
    """Quantize the input of each named layer, and each named operand of attention, such as `<attention>.query`.

    `quantry.layers.operands.detach_all` takes them away again. The quantizers move to the device of the network.
    """
    device = next(unet.parameters()).device
    for name, quantizer in quantizers.items():
        attach(unet, operand_of(name), quantizer.to(device))


def operand_of(name: str) -> str:
    """The operand that a quantizer's name stands for: a layer's stands for its input."""
    return name if name.rpartition(".")[2] in ROLES else f"{name}.input"


@contextmanager
def trainable(quantizers: Iterable[StepQuantizer]) -> Iterator[list[nn.Parameter]]:
    """Let the step sizes of these quantizers take gradients for the length of the block; yields them."""
    parameters = [quantizer.log_scale for quantizer in quantizers]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield parameters
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
