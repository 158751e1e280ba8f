"""The diagonal of the Fisher information of a tensor inside a classifier: squared gradients of sampled labels.

With y drawn from the network's own prediction p, E[(d log p(y) / d o)^2] is the diagonal of the Fisher matrix
of an output o, which stands for the diagonal of the loss's Hessian. Drawing y is what makes the gradient
well-defined: that of the divergence from the network's own logits is exactly 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantry.layers.operands import attach, detach_all


def sampled_labels(logits: Tensor, draws: int, seed: int) -> Tensor:
    """Labels drawn from softmax(logits): (N, classes) to (draws, N) int64; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(logits.float().cpu().softmax(-1), draws, replacement=True, generator=generator)
    return drawn.T.to(logits.device)


class _Catch(nn.Module):
    """Passes a tensor on and keeps it under its name."""

    def __init__(self, name: str, caught: dict[str, Tensor]) -> None:
        super().__init__()
        self._name, self._caught = name, caught

    def forward(self, x: Tensor) -> Tensor:
        self._caught[self._name] = x
        return x


def run_and_catch(
    network: Any, pixels: Tensor, operands: Sequence[str], layers: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a float network whose parameters need no gradient, up to its logits.

    Args:
        pixels: (N, C, H, W). operands: tensors to catch, as `quantry.layers.operands` names them.
        layers: linear and convolution layers whose outputs are caught, under the layer's name; the graph
            starts at the first of them, so that nothing before is kept or differentiated.
    Returns: logits (N, classes) and the tensors, all in the graph.
    """
    caught: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        caught[name] = output if output.requires_grad else output.requires_grad_()

    for name in operands:
        attach(network, name, _Catch(name, caught))
    hooks = [network.get_submodule(name).register_forward_hook(partial(keep, name)) for name in layers]
    try:
        with torch.enable_grad():
            return network(pixels).logits.float(), caught
    finally:
        for hook in hooks:
            hook.remove()
        detach_all(network)


def fisher_diagonals(logits: Tensor, labels: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    """The mean over `labels` (draws, N) of g^2, with g the gradient of an image's own -log p(y).

    The loss is summed over the images, so that no image's gradient depends on the batch it ran in.
    outputs: tensors in the graph of logits (N, classes). Returns: float32, of their shapes.
    """
    totals = [torch.zeros_like(x, dtype=torch.float32) for x in outputs]
    for y in labels:
        loss = nn.functional.cross_entropy(logits, y, reduction="sum")
        for total, g in zip(totals, torch.autograd.grad(loss, outputs, retain_graph=True), strict=True):
            total.add_(g.float().square())
    return [total.div_(len(labels)) for total in totals]
