"""Streams of hidden states: the windows of a text on their way through the blocks, in one buffer each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worker.models.calls import BlockCall, run_block
from worker.models.network import Network


@dataclass
class Stream:
    """`hidden` (windows, length, width) is overwritten by each block; `calls` maps a batch's size to the calls.

    tokens: what went in: token windows, or pixels (images, channels, height, width).
    """

    tokens: Tensor
    hidden: Tensor
    calls: dict[int, list[BlockCall]]
    batch: int
    _reshaped: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def embed(cls, model: Network, tokens: Tensor) -> Stream:
        """What enters the first block."""
        batch = model.batch(tokens)
        hidden: Tensor | None = None
        calls: dict[int, list[BlockCall]] = {}
        for start in range(0, len(tokens), batch):
            part = tokens[start : start + batch]
            states, recorded = model.embed(part)
            calls.setdefault(len(part), recorded)
            if hidden is None:
                hidden = torch.empty(len(tokens), *states.shape[1:], dtype=states.dtype, device=states.device)
            hidden[start : start + len(part)] = states
        assert hidden is not None
        return cls(tokens, hidden, calls, batch)

    def batches(self, index: int) -> Iterator[tuple[slice, Tensor, BlockCall]]:
        """The batches for block `index`: where they lie, their states, how to call the block."""
        for start in range(0, len(self.hidden), self.batch):
            where = slice(start, min(start + self.batch, len(self.hidden)))
            states = self.hidden[where]
            yield where, states, self.calls[len(states)][index]

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int) -> None:
        """Run the block over the whole stream, in place."""
        for where, states, call in self.batches(index):
            self.put(where, run_block(block, states, call))

    def put(self, where: slice, states: Tensor) -> None:
        """Set what one batch leaves a block with, in order; the buffer changes where the block changes the shape."""
        if states.shape[1:] == self.hidden.shape[1:]:
            self.hidden[where] = states
            return
        if self._reshaped is None:
            self._reshaped = states.new_empty(len(self.hidden), *states.shape[1:])
        self._reshaped[where] = states
        if where.stop == len(self.hidden):
            self.hidden, self._reshaped = self._reshaped, None


@torch.no_grad()
def difference(stream: Stream, reference: Stream) -> tuple[float, float]:
    """Relative mean squared difference of two streams, and the rms over channels of their mean difference."""
    squared = power = 0.0
    mean = torch.zeros(stream.hidden.shape[-1], dtype=torch.float64, device=stream.hidden.device)
    for a, b in zip(
        torch.split(stream.hidden, stream.batch), torch.split(reference.hidden, stream.batch), strict=True
    ):
        error = a.float() - b.float()
        squared += float(error.square().sum(dtype=torch.float64))
        power += float(b.float().square().sum(dtype=torch.float64))
        mean += error.flatten(0, -2).sum(0, dtype=torch.float64)
    mean /= stream.hidden[..., 0].numel()
    return squared / max(power, 1e-300), float(mean.square().mean().sqrt())
