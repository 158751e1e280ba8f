"""The scale search of PTQ4ViT: the distance of eq. 3 for many grids at once, and the turns it is lowered in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from worker.methods.ptq4vit_spaces import Space

FINALISTS = 8
CHUNK = 1 << 22  # elements of a temporary, where one candidate takes fewer


class Rows(Protocol):
    """What a distance is taken over, the rows of most Fisher information first."""

    @property
    def few(self) -> Self: ...


R = TypeVar("R", bound=Rows)


def search(distances: Callable[[R, Tensor], Tensor], rows: R, space: Space, incumbent: Tensor) -> Tensor:
    """The parameters (U, P) of least distance; each of the U is chosen by its own.

    All candidates are screened on few rows; all rows decide among the FINALISTS and the incumbent, so that the
    distance on all rows never rises.

    Args:
        distances: of candidates (n, U, P) on some rows: (n, U). incumbent: (U, P).
    """
    if len(space.candidates) == 0:
        return incumbent
    finalists = min(FINALISTS, len(space.candidates))
    kept = distances(rows.few, space.candidates).topk(finalists, dim=0, largest=False).indices
    finals = space.candidates.gather(0, kept.unsqueeze(-1).expand(-1, -1, incumbent.shape[-1]))
    finals = torch.cat([incumbent.unsqueeze(0), finals])
    best = distances(rows, finals).argmin(0)
    return finals[best, torch.arange(len(best), device=best.device)]


def _in_chunks(evaluate: Callable[[Tensor], Tensor], candidates: Tensor, elements: int) -> Tensor:
    """`evaluate` on so many candidates at a time that a temporary of `elements` for each stays small."""
    return torch.cat([evaluate(part) for part in torch.split(candidates, max(1, CHUNK // elements))])


@dataclass(frozen=True)
class LinearRows:
    """x: (T, in). fisher: (T, out). w: (out, in), of all layers that take x."""

    x: Tensor
    fisher: Tensor
    w: Tensor

    @cached_property
    def target(self) -> Tensor:
        return self.x @ self.w.T  # a bias would be the same on both sides of eq. 3

    @cached_property
    def few(self) -> LinearRows:
        count = max(64, len(self.x) // 8)
        return replace(self, x=self.x[:count], fisher=self.fisher[:count])

    def input_distances(self, candidates: Tensor, inputs: Space, w: Tensor) -> Tensor:
        """Of each grid of the input (n, 1, P), given the quantized weight w: (n, 1)."""

        def evaluate(part: Tensor) -> Tensor:
            error = (inputs.quantize(self.x, part) @ w.T).sub_(self.target)
            return error.square_().mul_(self.fisher).mean((1, 2)).unsqueeze(1)

        return _in_chunks(evaluate, candidates, len(self.x) * max(self.w.shape))

    def weight_distances(self, candidates: Tensor, weights: Space, inputs: Space, p: Tensor) -> Tensor:
        """Of each grid of an output channel (n, out, P), given the grid p of the input: (n, out)."""
        x = inputs.quantize_one(self.x, p)

        def evaluate(part: Tensor) -> Tensor:
            out = x @ weights.quantize(self.w, part).flatten(0, 1).T
            error = out.view(len(x), len(part), -1).sub_(self.target.unsqueeze(1))
            return error.square_().mul_(self.fisher.unsqueeze(1)).mean(0)

        return _in_chunks(evaluate, candidates, max(self.w.numel(), len(self.w) * len(x)))


def search_linear(rows: LinearRows, inputs: Space, weights: Space, rounds: int) -> tuple[Tensor, Tensor]:
    """Alternate between the grids of the weight and of the input, until neither moves or `rounds` are over.

    Returns: the parameters of the input's grid and of the weight's.
    """
    p, g = inputs.incumbent, weights.incumbent
    for _ in range(rounds):
        before = p, g
        g = _search_weights(rows, weights, g, inputs, p)
        p = _search_inputs(rows, inputs, p, weights.quantize_one(rows.w, g))
        if torch.equal(p, before[0]) and torch.equal(g, before[1]):
            break
    return p, g


def _search_weights(rows: LinearRows, weights: Space, g: Tensor, inputs: Space, p: Tensor) -> Tensor:
    return search(lambda part, grids: part.weight_distances(grids, weights, inputs, p), rows, weights, g)


def _search_inputs(rows: LinearRows, inputs: Space, p: Tensor, w: Tensor) -> Tensor:
    return search(lambda part, grids: part.input_distances(grids, inputs, w), rows, inputs, p)


@dataclass(frozen=True)
class AttentionRows:
    """query, key, value: (B, H, N, width). probabilities: (B, H, N, N). fisher: of their output, as value."""

    query: Tensor
    key: Tensor
    value: Tensor
    probabilities: Tensor
    fisher: Tensor

    @cached_property
    def target(self) -> Tensor:
        return self.probabilities @ self.value

    @cached_property
    def mask(self) -> Tensor:
        """What is added to the scores: the mask or the position bias, less a number for each query."""
        return self.probabilities.log() - self._scores(self.query, self.key)

    @cached_property
    def few(self) -> AttentionRows:
        n = max(4, len(self.query) // 8)
        tensors = (self.query, self.key, self.value, self.probabilities, self.fisher)
        return AttentionRows(*(tensor[:n] for tensor in tensors))

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        return query @ key.mT * float(self.query.shape[-1] ** -0.5)

    def _by_head(self, output: Tensor) -> Tensor:
        """Eq. 3 for outputs (n, B, H, N, width): (n, H)."""
        return (output - self.target).square_().mul_(self.fisher).mean((1, 3, 4))

    def query_distances(self, candidates: Tensor, space: Space, keys: Space, k: Tensor) -> Tensor:
        """Of each grid of Q (n, H, P), given the grid k of K: (n, H)."""
        key = keys.quantize_one(self.key, k)
        return self._score_distances(
            lambda part: self._scores(space.quantize(self.query, part), key), candidates
        )

    def key_distances(self, candidates: Tensor, space: Space, queries: Space, q: Tensor) -> Tensor:
        """Of each grid of K (n, H, P), given the grid q of Q: (n, H)."""
        query = queries.quantize_one(self.query, q)
        return self._score_distances(
            lambda part: self._scores(query, space.quantize(self.key, part)), candidates
        )

    def _score_distances(self, scores: Callable[[Tensor], Tensor], candidates: Tensor) -> Tensor:
        def evaluate(part: Tensor) -> Tensor:
            return self._by_head(scores(part).add_(self.mask).softmax(-1) @ self.value)

        return _in_chunks(evaluate, candidates, self.probabilities.numel())

    def probability_distances(self, candidates: Tensor, space: Space) -> Tensor:
        """Of each grid of P (n, 1, P), given float V: (n, 1)."""

        def evaluate(part: Tensor) -> Tensor:
            output = space.quantize(self.probabilities, part) @ self.value
            return self._by_head(output).mean(1, keepdim=True)

        return _in_chunks(evaluate, candidates, self.probabilities.numel())

    def value_distances(self, candidates: Tensor, space: Space, probabilities: Space, p: Tensor) -> Tensor:
        """Of each grid of V (n, H, P), given the grid p of P: (n, H)."""
        seen = probabilities.quantize_one(self.probabilities, p)

        def evaluate(part: Tensor) -> Tensor:
            return self._by_head(seen @ space.quantize(self.value, part))

        return _in_chunks(evaluate, candidates, self.value.numel())


def search_attention(rows: AttentionRows, spaces: Mapping[str, Space], rounds: int) -> dict[str, Tensor]:
    """Q and K by turns, until neither moves or `rounds` are over; then P with float V, then V given P.

    spaces, and the parameters that are returned: by role.
    """
    q, k = spaces["query"].incumbent, spaces["key"].incumbent
    for _ in range(rounds):
        before = q, k
        q = _search_query(rows, spaces, q, k)
        k = _search_key(rows, spaces, q, k)
        if torch.equal(q, before[0]) and torch.equal(k, before[1]):
            break
    probabilities, value = spaces["probabilities"], spaces["value"]
    p = search(
        lambda part, grids: part.probability_distances(grids, probabilities),
        rows,
        probabilities,
        probabilities.incumbent,
    )
    v = search(
        lambda part, grids: part.value_distances(grids, value, probabilities, p),
        rows,
        value,
        value.incumbent,
    )
    return {"query": q, "key": k, "probabilities": p, "value": v}


def _search_query(rows: AttentionRows, spaces: Mapping[str, Space], q: Tensor, k: Tensor) -> Tensor:
    queries, keys = spaces["query"], spaces["key"]
    return search(lambda part, grids: part.query_distances(grids, queries, keys, k), rows, queries, q)


def _search_key(rows: AttentionRows, spaces: Mapping[str, Space], q: Tensor, k: Tensor) -> Tensor:
    queries, keys = spaces["query"], spaces["key"]
    return search(lambda part, grids: part.key_distances(grids, keys, queries, q), rows, keys, k)
