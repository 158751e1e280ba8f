"""The scale search of PTQ4ViT: the distance of eq. 3 for many grids at once, and the turns it is lowered in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from worker.methods.ptq4vit_spaces import Space

# How candidates are screened: (n, kept) looks at every n-th row, the heaviest, and keeps so many of them. A grid
# of its own for each channel is chosen from few terms, a tensor's from many.
CHANNELS = ((64, 50), (16, 20), (4, 6))
TENSOR = ((64, 24), (16, 8), (4, 3))
START = 8  # every n-th row finds where the turns start
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}  # elements of a temporary, where one candidate takes fewer

Screening = tuple[tuple[int, int], ...]


class Rows(Protocol):
    """What a distance is taken over, the rows of most Fisher information first."""

    def part(self, share: int) -> Self:
        """The first of `share` equal parts of the rows."""


R = TypeVar("R", bound=Rows)
Distances = Callable[[R, Tensor], Tensor]  # of candidates (n, U, P) on some rows: (n, U)


def screened(distances: Distances[R], rows: R, space: Space, screening: Screening) -> Space:
    """The space with the candidates that are left: of each of the U those of least distance on fewer rows."""
    candidates = space.candidates
    for share, kept in screening:
        if len(candidates) > kept:
            nearest = distances(rows.part(share), candidates).topk(kept, dim=0, largest=False).indices
            candidates = candidates.gather(0, nearest.unsqueeze(-1).expand(-1, -1, candidates.shape[-1]))
    return replace(space, candidates=candidates)


def nearest(distances: Distances[R], rows: R, space: Space, incumbent: Tensor) -> Tensor:
    """The parameters (U, P) of least distance on the rows, each of the U by its own; never worse than the incumbent."""
    if len(space.candidates) == 0:
        return incumbent
    finals = torch.cat([incumbent.unsqueeze(0), space.candidates])
    best = distances(rows, finals).argmin(0)
    return finals[best, torch.arange(len(best), device=best.device)]


def searched(distances: Distances[R], rows: R, space: Space) -> Tensor:
    """The parameters (U, P) of a tensor that is searched once."""
    return nearest(distances, rows, screened(distances, rows, space, TENSOR), space.incumbent)


@dataclass
class Turn(Generic[R]):
    """One of two searches that take turns. given: distances, for the parameters of the other one."""

    given: Callable[[Tensor], Distances[R]]
    space: Space
    screening: Screening
    shortlist: Space | None = None

    def start(self, rows: R, other: Tensor) -> Tensor:
        """The parameters to start with, from a few rows."""
        distances = self.given(other)
        few = screened(distances, rows, self.space, self.screening[:-1])
        return nearest(distances, rows.part(START), few, self.space.incumbent)

    def take(self, rows: R, other: Tensor, incumbent: Tensor) -> Tensor:
        """The best of the shortlist, which the first turn makes: it hardly depends on the other from there on."""
        distances = self.given(other)
        if self.shortlist is None:
            self.shortlist = screened(distances, rows, self.space, self.screening)
        return nearest(distances, rows, self.shortlist, incumbent)


def alternate(rows: R, first: Turn[R], second: Turn[R], rounds: int) -> tuple[Tensor, Tensor]:
    """Search by turns until neither moves or `rounds` are over; on all rows the distance never rises.

    They start at what a turn on few rows finds, wherever that is better on all rows than the incumbents: the errors
    of the two make up for each other, and a shortlist made at the incumbents would miss the end.
    """
    a, b = first.space.incumbent, second.space.incumbent
    near_a = first.start(rows, b)
    near_b = second.start(rows, near_a)
    before, after = (second.given(x)(rows, y.unsqueeze(0))[0] for x, y in ((a, b), (near_a, near_b)))
    better = (after < before).unsqueeze(-1)
    a, b = torch.where(better, near_a, a), torch.where(better, near_b, b)
    for _ in range(rounds):
        was = a, b
        a = first.take(rows, b, a)
        b = second.take(rows, a, b)
        if torch.equal(a, was[0]) and torch.equal(b, was[1]):
            break
    return a, b


def _in_chunks(evaluate: Callable[[Tensor], Tensor], candidates: Tensor, elements: int) -> Tensor:
    """`evaluate` on so many candidates at a time that a temporary of `elements` for each stays small."""
    at_once = max(1, CHUNK[candidates.device.type] // elements)
    return torch.cat([evaluate(part) for part in torch.split(candidates, at_once)])


@dataclass(frozen=True)
class LinearRows:
    """x: (T, in). fisher: (T, out). w: (out, in), of all layers that take x."""

    x: Tensor
    fisher: Tensor
    w: Tensor

    @cached_property
    def target(self) -> Tensor:
        return self.x @ self.w.T  # a bias would be the same on both sides of eq. 3

    def part(self, share: int) -> LinearRows:
        count = max(16, len(self.x) // share)
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
    """Alternate between the grids of the weight and of the input.

    Returns: the parameters of the input's grid and of the weight's.
    """

    def given_input(p: Tensor) -> Distances[LinearRows]:
        return lambda part, grids: part.weight_distances(grids, weights, inputs, p)

    def given_weight(g: Tensor) -> Distances[LinearRows]:
        w = weights.quantize_one(rows.w, g)
        return lambda part, grids: part.input_distances(grids, inputs, w)

    first, second = Turn(given_input, weights, CHANNELS), Turn(given_weight, inputs, TENSOR)
    g, p = alternate(rows, first, second, rounds)
    return p, g


@dataclass(frozen=True)
class AttentionRows:
    """Of B images (or windows), H heads, Q queries that were chosen and all N keys.

    query: (B, H, Q, width). key, value: (B, H, N, width). probabilities: (B, H, Q, N). fisher: of their output
    (B, H, Q, width).
    """

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

    def part(self, share: int) -> AttentionRows:
        n = max(2, len(self.query) // share)
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
    """Q and K by turns; then P with float V, then V given P.

    spaces, and the parameters that are returned: by role.
    """
    queries, keys, values = spaces["query"], spaces["key"], spaces["value"]

    def given_key(k: Tensor) -> Distances[AttentionRows]:
        return lambda part, grids: part.query_distances(grids, queries, keys, k)

    def given_query(q: Tensor) -> Distances[AttentionRows]:
        return lambda part, grids: part.key_distances(grids, keys, queries, q)

    first, second = Turn(given_key, queries, TENSOR), Turn(given_query, keys, TENSOR)
    q, k = alternate(rows, first, second, rounds)

    def of_probabilities(part: AttentionRows, grids: Tensor) -> Tensor:
        return part.probability_distances(grids, spaces["probabilities"])

    p = searched(of_probabilities, rows, spaces["probabilities"])

    def of_value(part: AttentionRows, grids: Tensor) -> Tensor:
        return part.value_distances(grids, values, spaces["probabilities"], p)

    return {"query": q, "key": k, "probabilities": p, "value": searched(of_value, rows, values)}
