"""AdaLog: logarithmic grids of searched base after softmax and GELU, uniform ones elsewhere.

Wu, Chen, Zhong, Huang, Wang, "AdaLog: Post-Training Quantization for Vision Transformers with Adaptive
Logarithm Quantizer", ECCV 2024, arXiv:2407.12951. A grid has two parameters: base and scale, or the two ends
of its range. They are searched together, from coarse to fine, for the least squared error of the output that
the operand is used for: of a layer, of Q K^T, or of P V.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantry.quantizers.activation import ActivationQuantizer, UniformQuantizer
from quantry.quantizers.logarithmic import LogQuantizer
from quantry.recipe import AdalogStep
from worker.errors import NonFiniteError
from worker.methods.activations import Calibrated, Images, observe
from worker.methods.repq import reparameterize_norms, sampled
from worker.models.vision import Operand, VisionModel

RESOLUTION = 37  # a base is 2**(k / RESOLUTION), k a positive integer: equation 6
OCTAVES = 24  # a grid that reaches further down than scale * 2**-OCTAVES gains nothing
REFINEMENTS = 6  # times the spacing is halved around the best candidate
ROWS = 512  # tokens on which a layer's output is compared
PASS = 4  # attention modules kept at a time
QUERIES = 64  # queries of an image on which attention is compared
PAIRS = 1 << 19  # query-key pairs on which attention is compared
PER_HEAD = ("query", "key", "value", "probabilities")

NEIGHBOURS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]

Point = tuple[Tensor, Tensor]  # both parameters, each (groups,)
Make = Callable[[Tensor, Tensor], ActivationQuantizer]
Errors = Callable[[ActivationQuantizer], Tensor]


def calibrate(model: VisionModel, images: Images, step: AdalogStep) -> Calibrated:
    """Static quantizers of every operand but the image.

    Post-LayerNorm operands are first reparameterized as in RepQ-ViT, which rewrites `model.network` and keeps
    its float function up to rounding (`worker.methods.repq`). Without it a DINOv2 ViT-S at W4A4 diverges
    about 30 per cent more from float (KL 0.170 for 0.132); a six-layer ViT is the same.
    """
    reparameterize_norms(model, images, step.bits)
    inputs = [o for o in model.operands if o.name.endswith(".input") and o.kind != "image"]
    attentions = [o.layers[0] for o in model.operands if o.kind == "query"]
    total = len(inputs) + len(attentions)
    quantizers: dict[str, ActivationQuantizer] = {}
    for done, (operand, x) in enumerate(sampled(model, images, inputs, ROWS)):
        quantizers[operand.name] = search_input(model, operand, x, step)
        images.tell(done + 1, total)
    for done, (name, sample) in enumerate(sampled_attention(model, images, attentions)):
        found = search_attention(sample, step)
        quantizers |= {f"{name}.{role}": quantizer for role, quantizer in found.items()}
        images.tell(len(inputs) + done + 1, total)
    return Calibrated(quantizers)


# The search.


@dataclass(frozen=True)
class Space:
    """Candidates: every pair of the two lists, each (n,) ascending and evenly spaced, made into a quantizer.

    make: takes both parameters, each (groups,), and must accept values beside the lists.
    """

    first: Tensor
    second: Tensor
    make: Make


def search(space: Space, errors: Errors, groups: int, start: Point | None = None) -> Point:
    """The parameters of least error, each group on its own: all candidates, then ever closer neighbours.

    errors: of a quantizer, (groups,). start: where to look for neighbours in place of among the candidates.
    """
    first, second = space.first.new_empty(groups), space.second.new_empty(groups)
    lowest = torch.full_like(first, torch.inf)

    def consider(a: Tensor, b: Tensor) -> None:
        error = errors(space.make(a, b))
        better = error < lowest
        first[better], second[better], lowest[better] = a[better], b[better], error[better]

    if start is None:
        for a, b in torch.cartesian_prod(space.first, space.second):
            consider(a.expand(groups), b.expand(groups))
    else:
        consider(*start)
    steps = _spacing(space.first), _spacing(space.second)
    for k in range(1, REFINEMENTS + 1):
        a, b = first.clone(), second.clone()
        for i, j in NEIGHBOURS:
            consider(a + i * steps[0] / 2**k, b + j * steps[1] / 2**k)
    return first, second


def _spacing(values: Tensor) -> float:
    return float(values[-1] - values[0]) / max(len(values) - 1, 1)


def uniform_space(x: Tensor, bits: int, shape: list[int], candidates: int) -> Space:
    """Shares of the range below and above 0 that a grid covers. x: (values, groups)."""
    low, high = x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)
    shares = torch.linspace(0.1, 1, max(2, math.isqrt(candidates)), device=x.device)

    def make(below: Tensor, above: Tensor) -> ActivationQuantizer:
        below, above = below.clamp(0, 1), above.clamp(0, 1)
        return UniformQuantizer.covering((below * low).view(shape), (above * high).view(shape), bits)

    return Space(shares, shares, make)


def log_space(x: Tensor, bits: int, shape: list[int], candidates: int) -> Space:
    """Bases 2**(k / RESOLUTION), by k, and scales, by their share of the largest value. x: (values, groups)."""
    shift = (-x.amin(0)).clamp(min=0)
    top = (x.amax(0) + shift).clamp(min=torch.finfo(torch.float32).tiny * 2**bits)
    most = max(2, math.ceil(RESOLUTION * OCTAVES / 2**bits))
    bases = torch.linspace(1, most, min(most, max(2, math.isqrt(2 * candidates))), device=x.device)
    scales = torch.linspace(0.2, 1, max(2, candidates // len(bases)), device=x.device)

    def make(k: Tensor, share: Tensor) -> ActivationQuantizer:
        exponent = k.round().clamp(min=1) / RESOLUTION
        quantizer = LogQuantizer(bits, shape).to(x.device)
        return quantizer.fill(
            scale=(share.clamp(0.05, 1.5) * top).view(shape),
            exponent=exponent.view(shape),
            shift=shift.view(shape),
        )

    return Space(bases, scales, make)


# Inputs of layers.


def search_input(model: VisionModel, operand: Operand, x: Tensor, step: AdalogStep) -> ActivationQuantizer:
    """The grid of x (rows, in) that changes the output of its layers least."""
    root = output_root(torch.cat([model.weight(name) for name in operand.layers]))

    def errors(quantizer: ActivationQuantizer) -> Tensor:
        change: Tensor = (quantizer(x) - x) @ root.T
        return change.square_().sum().view(1)

    space = log_space if operand.kind == "post_activation" else uniform_space
    grids = space(x.reshape(-1, 1), step.bits, [], step.candidates)
    return grids.make(*search(grids, errors, 1))


def output_root(weight: Tensor) -> Tensor:
    """A matrix R with |R e| = |W e| for every e, and no more rows than W (out, in) has columns."""
    rows, columns = weight.shape
    return weight if rows <= columns else torch.linalg.qr(weight, mode="r").R


# Operands of attention.


@dataclass(frozen=True)
class AttentionSample:
    """n images (windows, for Swin) and t of the T queries of each, in float32.

    query: (n, H, t, d). key, value: (n, H, T, d). probabilities: (n, H, t, T).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    probabilities: Tensor


def search_attention(sample: AttentionSample, step: AdalogStep) -> dict[str, ActivationQuantizer]:
    """A grid for each head of every operand: first Q and K for the error of Q K^T, then P and V for that of P V.

    Each of two operands is searched with the other quantized as found so far, `rounds` times in turn; later
    rounds look around what the one before found.
    """
    q, k, v, p = sample.query, sample.key.transpose(2, 3), sample.value, sample.probabilities
    uniform = partial(uniform_space, bits=step.bits, candidates=step.candidates)
    log = partial(log_space, bits=step.softmax_bits or step.bits, candidates=step.candidates)
    query, key = search_product(q, k, _head_space(uniform, q), _head_space(uniform, k), step.rounds)
    probabilities, value = search_product(p, v, _head_space(log, p), _head_space(uniform, v), step.rounds)
    return {"query": query, "key": key, "value": value, "probabilities": probabilities}


def _head_space(make: Callable[..., Space], x: Tensor) -> Space:
    heads = x.shape[1]
    return make(x.transpose(0, 1).reshape(heads, -1).T, shape=[heads, 1, 1])


def search_product(
    a: Tensor, b: Tensor, first: Space, second: Space, rounds: int
) -> tuple[ActivationQuantizer, ActivationQuantizer]:
    """Grids of a (n, H, t, m) and b (n, H, m, d) that change a @ b least, head by head."""
    product, heads = a @ b, a.shape[1]
    left_factor, right_factor = a, b  # as quantized so far

    def changed_by_left(quantizer: ActivationQuantizer) -> Tensor:
        return _squares(quantizer(a) @ right_factor - product)

    def changed_by_right(quantizer: ActivationQuantizer) -> Tensor:
        return _squares(left_factor @ quantizer(b) - product)

    left = right = None
    for _ in range(rounds):
        left = search(first, changed_by_left, heads, left)
        left_factor = first.make(*left)(a)
        right = search(second, changed_by_right, heads, right)
        right_factor = second.make(*right)(b)
    assert left is not None
    assert right is not None
    return first.make(*left), second.make(*right)


def _squares(x: Tensor) -> Tensor:
    """The sum of squares of each head of x (n, H, ., .)."""
    return x.square().sum((0, 2, 3))


def sampled_attention(
    model: VisionModel, images: Images, attentions: list[str]
) -> Iterator[tuple[str, AttentionSample]]:
    """Each attention module with a sample of about PAIRS query-key pairs, alike from every batch; a few at a time.

    Raises: NonFiniteError for NaN or infinity.
    """
    batches = math.ceil(len(images.pixels) / model.images_at_once)
    for start in range(0, len(attentions), PASS):
        collectors = {
            name: Collector(PAIRS // batches, torch.Generator().manual_seed(images.seed))
            for name in attentions[start : start + PASS]
        }
        see = {
            f"{name}.{role}": partial(collector.see, role)
            for name, collector in collectors.items()
            for role in PER_HEAD
        }
        observe(model, images.pixels, see)
        for name in list(collectors):
            yield name, collectors.pop(name).sample(name)


class Collector:
    """Keeps matching parts of the four operands of an attention module, which come in the order of PER_HEAD."""

    def __init__(self, pairs: int, chance: torch.Generator) -> None:
        self._pairs, self._chance = pairs, chance
        self._kept: dict[str, list[Tensor]] = {role: [] for role in PER_HEAD}
        self._images = self._queries = torch.empty(0, dtype=torch.long)

    def see(self, role: str, x: Tensor) -> None:
        """x: (images, H, T, d), or (images, H, T, T) for probabilities; the query comes first."""
        if role == "query":
            images, heads, tokens, _ = x.shape
            queries = min(tokens, QUERIES)
            count = min(images, max(1, self._pairs // (heads * queries * tokens)))
            self._images = torch.randperm(images, generator=self._chance)[:count].to(x.device)
            self._queries = torch.randperm(tokens, generator=self._chance)[:queries].to(x.device)
        part = x[self._images]
        if role in ("query", "probabilities"):
            part = part[:, :, self._queries]
        self._kept[role].append(part.float())

    def sample(self, name: str) -> AttentionSample:
        parts = {role: torch.cat(kept) for role, kept in self._kept.items()}
        for role, part in parts.items():
            if not torch.isfinite(part).all():
                raise NonFiniteError(f"{name}.{role} met NaN or infinity: check the model and the images")
        return AttentionSample(**parts)
