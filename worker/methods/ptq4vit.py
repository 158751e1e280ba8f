"""PTQ4ViT: twin uniform grids, and scales searched under a gradient-weighted distance.

Yuan et al., "PTQ4ViT: Post-Training Quantization for Vision Transformers with Twin Uniform Quantization",
ECCV 2022, arXiv:2111.12293. Each layer is searched on its own, the rest of the network float, for the least
d = mean(F * (O - O_quantized)^2) (eq. 3), with F the diagonal of the Fisher information of the layer's output
O (`worker.calibration.fisher`; the published gradient, of the network against itself, is round-off).

Other departures from the published search:
- F has the same mean for each image, or the few that the network is unsure of would choose the grids alone;
- a weight has a scale for each output channel, chosen by that channel's own distance;
- a linear input, Q, K or V may take a grid with a zero-point as well as the symmetric one;
- Q and K are judged by the output of attention, as P and V are, and not by the scores;
- d is taken over the rows (tokens) with most Fisher information, and the candidates of a search are screened on
  the heaviest of them (`worker.methods.ptq4vit_search`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import groupby

import torch
from torch import Tensor, nn

from quantry.quantizers.activation import ActivationQuantizer
from quantry.quantizers.affine import QuantizedWeight, quantize_to_grid
from quantry.recipe import FISHER_DRAWS, Ptq4vitStep, RtnStep
from worker.calibration.fisher import BackwardWalk, Seen
from worker.errors import CalibrationError, RecipeError
from worker.methods.activations import Calibrated, Images
from worker.methods.grids import Grid
from worker.methods.ptq4vit_search import AttentionRows, LinearRows, search_attention, search_linear
from worker.methods.ptq4vit_spaces import (
    OperandSpace,
    gelu_space,
    softmax_space,
    uniform_space,
    unquantized,
    weight_space,
)
from worker.methods.rtn import on_grid
from worker.methods.uniform import bits_of, ranges_of
from worker.models.vision import Operand, VisionModel

TOKENS = 1024  # rows of a linear layer that are kept
WINDOWS = 64  # images, or Swin's windows, of an attention module that are kept
QUERIES = 2048  # of all of them together
ATTENTION = ("query", "key", "value", "probabilities")


def calibrate(model: VisionModel, images: Images, step: Ptq4vitStep) -> Calibrated:
    """Grids of all operands but the images and, where the weight step rounds to nearest, of all weights.

    Raises: RecipeError for a network without GELU; CalibrationError where gradients vanish.
    """
    if "gelu" not in str(model.config.hidden_act):
        raise RecipeError(
            f"ptq4vit's twin grid is made for GELU, and this model's hidden_act is `{model.config.hidden_act}`: "
            "use another activation method, such as `uniform`"
        )
    spaces = operand_spaces(model, images.pixels, step)
    draws = FISHER_DRAWS if step.metric == "fisher" else 0
    walk = BackwardWalk(model, images.pixels, draws=draws, seed=images.seed)
    weight_step = images.weights if isinstance(images.weights, RtnStep) else None
    blocks = blocks_of(model)
    found = Calibrated({})
    for done, operands in enumerate(reversed(blocks)):
        kept = kept_rows(model, operands, walk, images, step)
        for operand in operands:
            if operand.kind == "query":
                found.quantizers |= attention_grids(operand.layers[0], kept, spaces, step)
            elif operand.kind not in ATTENTION:
                part = linear_grids(model, operand, kept, spaces, weight_step, step)
                found.quantizers |= part.quantizers
                found.weights |= part.weights
        images.tell(done + 1, len(blocks))
    return found


def linear_grids(
    model: VisionModel,
    operand: Operand,
    kept: Mapping[str, tuple[Tensor, ...]],
    spaces: Mapping[str, OperandSpace],
    weight_step: RtnStep | None,
    step: Ptq4vitStep,
) -> Calibrated:
    """The grid of an operand and, where they are rounded to nearest, of the weights that multiply it."""
    weights = {name: model.weight(name) for name in operand.layers}
    x, fisher = kept[operand.name]
    rows = LinearRows(x, fisher, torch.cat(list(weights.values())))
    weight = weight_space(rows.w, weight_step, step.candidates) if weight_step else unquantized(x.device)
    inputs = spaces.get(operand.name)
    p, g = search_linear(rows, inputs or unquantized(x.device), weight, step.rounds)
    return Calibrated(
        {operand.name: inputs.build(p)} if inputs else {},
        weights_on_grid(weights, g, weight_step) if weight_step else {},
    )


def weights_on_grid(
    weights: Mapping[str, Tensor], grids: Tensor, step: RtnStep
) -> dict[str, QuantizedWeight]:
    """Layers (out, in) that share an input, on the grids (all their out, 2 groups) that were found for them."""
    parts = torch.split(grids, [len(w) for w in weights.values()])
    found = {}
    for (name, w), part in zip(weights.items(), parts, strict=True):
        scale, zero = part.chunk(2, dim=-1)
        codes = quantize_to_grid(w, scale, zero, step.bits)
        found[name] = on_grid(codes, Grid(scale, zero, step.bits, step.symmetric), step.group_size)
    return found


def attention_grids(
    attention: str,
    kept: Mapping[str, tuple[Tensor, ...]],
    spaces: Mapping[str, OperandSpace],
    step: Ptq4vitStep,
) -> dict[str, ActivationQuantizer]:
    """The grids of the four operands of an attention module."""
    of_role = {role: spaces[f"{attention}.{role}"] for role in ATTENTION}
    chosen = search_attention(AttentionRows(*kept[attention]), of_role, step.rounds)
    return {f"{attention}.{role}": of_role[role].build(p) for role, p in chosen.items()}


def operand_spaces(model: VisionModel, pixels: Tensor, step: Ptq4vitStep) -> dict[str, OperandSpace]:
    """Where the grid of each operand is searched, by name; all but the images."""
    operands = [operand for operand in model.operands if operand.kind != "image"]
    ranges = ranges_of(model, operands, pixels, by_head=True)
    spaces = {}
    for operand in operands:
        bits = bits_of(operand, step.bits, step.softmax_bits)
        low, high = ranges[operand.name]
        if operand.kind == "probabilities":
            spaces[operand.name] = softmax_space(bits, step.twin, low.device)
        elif operand.kind == "post_activation":
            spaces[operand.name] = gelu_space(high, bits, step.candidates)
        else:
            spaces[operand.name] = uniform_space(low, high, bits, step.candidates)
    return spaces


def blocks_of(model: VisionModel) -> list[list[Operand]]:
    """The operands, by the block that they are in."""
    prefixes = [model.prefix(i) for i in range(model.count)]

    def block(operand: Operand) -> str:
        return max((p for p in prefixes if not p or operand.name.startswith(f"{p}.")), key=len)

    return [list(operands) for _, operands in groupby(model.operands, block)]


# The rows that a search looks at.


def kept_rows(
    model: VisionModel, operands: list[Operand], walk: BackwardWalk, images: Images, step: Ptq4vitStep
) -> dict[str, tuple[Tensor, ...]]:
    """Of each group of linear layers (by its operand) and each attention module, the rows that weigh most.

    Linear: x (T, in) and F (T, out of all its layers). Attention: as `AttentionRows`. Heaviest first; F has mean 1.
    With the metric `mse`, F is 1 and the rows are drawn at random.
    """
    kept: dict[str, tuple[Tensor, ...]] = {}
    chance = torch.Generator().manual_seed(images.seed)
    names = [operand.name for operand in operands]
    layers = [name for o in operands if o.kind not in ATTENTION for name in o.layers]
    outputs = [o.name for o in operands if o.kind == "attention_output"]

    def keys(fisher: Tensor) -> Tensor:
        """What rows (rows, ...) weigh, (rows)."""
        if step.metric == "fisher":
            return fisher.flatten(1).sum(1)
        return torch.rand(len(fisher), generator=chance).to(fisher.device)

    for seen in walk.visit(names, layers, [*layers, *outputs]):
        for name, tensors in _rows(model, operands, seen, len(images.pixels), keys).items():
            rows = tensors
            if name in kept:
                rows = tuple(torch.cat(pair) for pair in zip(kept[name], tensors, strict=True))
            limit = TOKENS if len(tensors) == 3 else WINDOWS
            order = rows[0].argsort(descending=True, stable=True)[:limit]
            kept[name] = tuple(tensor[order] for tensor in rows)
    return {name: (*rows[1:-1], _normalised(rows[-1], name)) for name, rows in kept.items()}


def by_image(fisher: Tensor, count: int) -> Tensor:
    """F with mean 1 over each of `count` images, which lie along the first dimension; 0 where an image's is 0."""
    flat = fisher.reshape(count, -1)
    mean = flat.mean(1, keepdim=True)
    return (flat / torch.where(mean > 0, mean, 1)).view(fisher.shape)


def _normalised(fisher: Tensor, name: str) -> Tensor:
    mean = fisher.double().mean()
    if not torch.isfinite(mean) or mean == 0:
        raise CalibrationError(
            f"{name}: the gradients of sampled labels are {'zero' if mean == 0 else 'not finite'} on all "
            "calibration images; use `metric: mse`, or other images"
        )
    return (fisher / mean).float()


def _rows(
    model: VisionModel, operands: list[Operand], seen: Seen, count: int, keys: Callable[[Tensor], Tensor]
) -> dict[str, tuple[Tensor, ...]]:
    """All rows of one batch of the `count` images, `keys` of them first; F has mean 1 over each image."""
    fisher = {name: by_image(f, seen.images) for name, f in seen.fisher.items()}
    rows: dict[str, tuple[Tensor, ...]] = {}
    for operand in operands:
        if operand.kind == "query":
            name = operand.layers[0]
            query, key, value, p = (seen.tensors[f"{name}.{role}"] for role in ATTENTION)
            windows = len(query) // seen.images * count
            chosen = _queries(query, key, value, p, fisher[f"{name}.o_proj.input"], windows, keys)
            rows[name] = (keys(chosen[-1]), *chosen)
        elif operand.kind not in ATTENTION:
            x = input_rows(model.layer(operand.layers[0]), seen.tensors[operand.name])
            of_rows = torch.cat([output_rows(fisher[layer]) for layer in operand.layers], 1)
            rows[operand.name] = keys(of_rows), x, of_rows
    return rows


def _queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probabilities: Tensor,
    fisher: Tensor,
    windows: int,
    keys: Callable[[Tensor], Tensor],
) -> tuple[Tensor, ...]:
    """The tensors of `AttentionRows`, with those queries that weigh most. fisher: (B, N, heads * width).

    windows: how many there are in all, of which WINDOWS are kept at most.
    """
    images, heads, tokens, width = query.shape
    count = min(tokens, math.ceil(QUERIES / min(windows, WINDOWS)))
    chosen = keys(fisher.flatten(0, 1)).view(images, tokens).topk(count).indices[:, None, :, None]
    by_head = fisher.view(images, tokens, heads, width).transpose(1, 2)
    of_query, of_row, of_output = (
        x.gather(2, chosen.expand(-1, heads, -1, x.shape[-1])) for x in (query, probabilities, by_head)
    )
    return of_query, key, value, of_row, of_output


def input_rows(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """What the weight (out, in) of a layer multiplies: (rows, in); the patches, of a convolution."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    patches = nn.functional.unfold(x, layer.kernel_size, stride=layer.stride)
    return patches.transpose(1, 2).flatten(0, 1)


def output_rows(x: Tensor) -> Tensor:
    """(..., out), or (images, out, height, width) of a convolution, as (rows, out)."""
    return x.flatten(2).transpose(1, 2).flatten(0, 1) if x.dim() == 4 else x.flatten(0, -2)
