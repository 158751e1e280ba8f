"""The diagonal of the Fisher information of tensors inside a classifier: squared gradients of sampled labels.

With y drawn from the network's own prediction p, E[(d log p(y) / d o)^2] is the diagonal of the Fisher matrix
of an output o, which stands for the diagonal of the loss's Hessian. Drawing y is what makes the gradient
well-defined: that of the divergence from the network's own logits is exactly 0.

Blocks are visited from the last to the first, each run once more on what entered it, so that one walk through the
network gives the gradients of all its tensors and no more than one block's graph is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from quantry.layers.operands import attach, detach_all
from worker.models.vision import VisionModel


def sampled_labels(logits: Tensor, draws: int, seed: int) -> Tensor:
    """Labels drawn from softmax(logits): (N, classes) to (draws, N) int64; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(logits.float().cpu().softmax(-1), draws, replacement=True, generator=generator)
    return drawn.T.to(logits.device)


@dataclass(frozen=True)
class Seen:
    """One batch of `images` in a block. tensors: by operand, and by layer what it returns. fisher: of some of them."""

    images: int
    tensors: dict[str, Tensor]
    fisher: dict[str, Tensor]


class BackwardWalk:
    """From the last block of a float network to its first, over the same images.

    Args:
        pixels: (N, C, H, W), run `model.images_at_once` at a time.
        draws: labels drawn for each image; 0: no gradients, and F is 1. seed: of the labels.
    """

    @torch.no_grad()
    def __init__(self, model: VisionModel, pixels: Tensor, *, draws: int, seed: int) -> None:
        self.model, self.draws, self.next = model, draws, model.count - 1
        self._given: list[list[Tensor]] = [[] for _ in range(model.count)]  # what enters a block, by batch
        found: list[Tensor] = []
        for part in torch.split(pixels, model.images_at_once):
            states = part.to(model.device)
            for index in range(model.count):
                self._given[index].append(states)
                states = model.run(index, states)
            found.append(states)
        # of -log p(y), summed over the images, by batch: (draws, n, ...)
        self._gradients = list(
            torch.split(_of_logits(torch.cat(found), draws, seed), model.images_at_once, 1)
        )

    def visit(self, operands: Sequence[str], layers: Sequence[str], weighed: Sequence[str]) -> Iterator[Seen]:
        """Every batch through the next block on the way, with the mean over labels of squared gradients.

        operands: tensors of the block to catch, as `quantry.layers.operands` names them. layers: linear layers and
        convolutions of it whose outputs are caught. weighed: which of both F is wanted of. The walk goes on when
        all batches were taken.
        """
        index = self.next
        for batch, states in enumerate(self._given[index]):
            caught: dict[str, Tensor] = {}
            states.requires_grad_(index > 0 and self.draws > 0)
            with _catching(self.model, operands, layers, caught), torch.set_grad_enabled(self.draws > 0):
                out = self.model.run(index, states)
            fisher = self._fisher(batch, out, [caught[name] for name in weighed], states)
            tensors = {name: x.detach() for name, x in caught.items()}
            yield Seen(len(states), tensors, dict(zip(weighed, fisher, strict=True)))
        self._given[index].clear()
        self.next -= 1

    def _fisher(self, batch: int, out: Tensor, tensors: list[Tensor], states: Tensor) -> list[Tensor]:
        """F of tensors in the graph of `out`; the gradients go on to what entered the block."""
        if not self.draws:
            return [torch.ones_like(x) for x in tensors]
        totals = [torch.zeros_like(x) for x in tensors]
        entered = [states] if states.requires_grad else []
        before: list[Tensor] = []
        for gradient in self._gradients[batch]:
            found = torch.autograd.grad(out, [*tensors, *entered], gradient, retain_graph=True)
            for total, g in zip(totals, found, strict=False):
                total.addcmul_(g, g, value=1 / self.draws)
            before += found[len(tensors) :]
        if before:
            self._gradients[batch] = torch.stack(before)
        return totals


def _of_logits(logits: Tensor, draws: int, seed: int) -> Tensor:
    """The gradient of -log p(y) for `draws` labels of each image: (draws, N, classes)."""
    if not draws:
        return logits.new_empty(0, *logits.shape)
    labels = sampled_labels(logits, draws, seed)
    return logits.softmax(-1) - nn.functional.one_hot(labels, logits.shape[-1])


class _Catch(nn.Module):
    """Passes a tensor on and keeps it under its name."""

    def __init__(self, name: str, caught: dict[str, Tensor]) -> None:
        super().__init__()
        self._name, self._caught = name, caught

    def forward(self, x: Tensor) -> Tensor:
        self._caught[self._name] = x
        return x


def _catching(
    model: VisionModel, operands: Sequence[str], layers: Sequence[str], caught: dict[str, Tensor]
) -> ExitStack:
    """Until it is closed, tensors are kept in `caught`; a graph starts at the first output where none is yet."""

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()
        caught[name] = output

    stack = ExitStack()
    stack.callback(detach_all, model.network)
    for name in operands:
        attach(model.network, name, _Catch(name, caught))
    for name in layers:
        hook = model.network.get_submodule(name).register_forward_hook(partial(keep, name))
        stack.callback(hook.remove)
    return stack
