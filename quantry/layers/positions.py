"""Where a token stands in its text or image, for layers whose bias depends on it (position×channel compensation)."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Locator(Protocol):
    """Tells the positions of a layer's tokens."""

    def of(self, x: Tensor) -> Tensor:
        """The positions of the tokens of x, a layer's input: int64 (1 or batch, sequence), on its device."""


class TokenIndices:
    """Images: a token's position is its index, (1, tokens); in an attention layer of Swin that in its window.

    A tensor (batch, channels) without tokens, such as a pooled one, has the one position 0.
    """

    def of(self, x: Tensor) -> Tensor:
        tokens = x.shape[-2] if x.dim() > 2 else 1
        return torch.arange(tokens, device=x.device).unsqueeze(0)


class Positions:
    """Texts: the positions of the tokens in the present forward, shared by the layers of one model.

    `current`: int64 (1 or batch, sequence), set by a hook on the model before its layers run.
    """

    def __init__(self) -> None:
        self.current: Tensor | None = None

    def watch(self, model: nn.Module) -> None:
        """Follow the calls of a causal LM, its cache and its padding included."""
        model.register_forward_pre_hook(self._before, with_kwargs=True)

    def of(self, x: Tensor) -> Tensor:
        if self.current is None:
            raise RuntimeError(
                "a layer with a bias per position runs only inside the model it was loaded with"
            )
        return self.current.to(x.device)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        self.current = token_positions(
            tokens.shape[1],
            tokens.device,
            kwargs.get("position_ids"),
            kwargs.get("attention_mask"),
            _seen(kwargs),
        )


def _seen(kwargs: dict[str, Any]) -> int:
    cache = kwargs.get("cache", kwargs.get("past_key_values"))  # transformers renamed it in 5.24
    return int(cache.get_seq_length()) if cache is not None else 0


def token_positions(
    length: int, device: torch.device, position_ids: Tensor | None, attention_mask: Tensor | None, seen: int
) -> Tensor:
    """Positions of `length` new tokens after `seen` cached ones: (1 or batch, length) int64.

    Explicit ids win; else padding, marked by zeros of a (batch, seen + length) mask, is not counted.
    """
    if position_ids is not None:
        return position_ids.view(-1, length).to(device)
    if attention_mask is not None and attention_mask.dim() == 2:
        counted = attention_mask.long().cumsum(dim=1) - 1
        return counted.clamp(min=0)[:, -length:].to(device)
    return torch.arange(seen, seen + length, device=device).unsqueeze(0)


def position_bias_of(table: Tensor, positions: Tensor) -> Tensor:
    """Rows of the table at these positions; past its end the mean row, the best single guess.

    Args: table (P, out); positions (batch, sequence). Returns: (batch, sequence, out).
    """
    rows = table[positions.clamp(max=len(table) - 1)]
    beyond = (positions >= len(table)).unsqueeze(-1)
    return torch.where(beyond, table.mean(dim=0), rows) if bool(beyond.any()) else rows
