"""Streams of hidden states: the windows of a text on their way through the blocks, in one buffer each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from worker.errors import NonFiniteError
from worker.models.causal_lm import BlockCall, CausalLM, run_block

BATCH_TOKENS = 2048  # windows that run together hold about this many tokens
HEAD_TOKENS = 256  # positions whose logits exist at once


@dataclass
class Stream:
    """`hidden` (windows, length, width) is overwritten by each block; `calls` maps a batch's size to the calls."""

    tokens: Tensor
    hidden: Tensor
    calls: dict[int, list[BlockCall]]
    batch: int

    @classmethod
    @torch.no_grad()
    def embed(cls, model: CausalLM, tokens: Tensor) -> Stream:
        """What enters the first block, for tokens (windows, length)."""
        batch = max(1, BATCH_TOKENS // tokens.shape[1])
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
            self.hidden[where] = run_block(block, states, call)


@torch.no_grad()
def perplexity(model: CausalLM, stream: Stream, tell: Callable[[int], None]) -> float:
    """exp(mean negative log-likelihood) over the length - 1 predictions of every window, summed in float64.

    `stream` has left the last block. `tell` hears how many windows are done.
    Raises: NonFiniteError if the likelihood is not finite.
    """
    total, count = 0.0, 0
    for number, (window, states) in enumerate(zip(stream.tokens, stream.hidden, strict=True), 1):
        for low in range(0, len(window) - 1, HEAD_TOKENS):
            high = min(low + HEAD_TOKENS, len(window) - 1)
            logits = model.head(window[None, low:high], states[None, low:high])[0].float()
            targets = window[low + 1 : high + 1].to(logits.device)
            total += float(cross_entropy(logits, targets, reduction="sum"))
            count += high - low
        if number % 8 == 0 or number == len(stream.tokens):
            tell(number)
    if not math.isfinite(total):
        raise NonFiniteError("the model's log-likelihood is NaN or infinite")
    return math.exp(min(total / count, 700.0))


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
        mean += error.sum((0, 1), dtype=torch.float64)
    mean /= stream.tokens.numel()
    return squared / max(power, 1e-300), float(mean.square().mean().sqrt())
