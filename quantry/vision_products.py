"""The products of an image classifier from its config.json alone, and the least that IGQ-ViT's grouping adds to them.

A worker counts both on the network itself (`worker.methods.bops`); a budget that no assignment meets is refused here,
before a job waits for one. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from quantry.base import FLOAT_BITS, SpecError
from quantry.checkpoint_checks import size_of
from quantry.recipe import IgqStep
from quantry.vision import VisionFamily, class_count
from quantry.vision_layers import (
    feed_forward,
    filled,
    scaled,
    sides_at,
    size_at,
    stages_of,
    stem_width,
    token_count,
)

IMAGE_BITS = 8
QUARTERS = (1, 2, 3, 4, 5, 6, 8)  # of the uniform number of groups: what an operand may be given instead


class Product(NamedTuple):
    """`instances` times (rows, inner) @ (inner, columns). kind: of the left operand, as a worker names it."""

    kind: str
    instances: int
    rows: int
    inner: int
    columns: int


def group_counts(step: IgqStep) -> tuple[int, ...]:
    """The numbers of groups to fit: one, or from a quarter to twice of it; 2, 4, 6, 8, 10, 12, 16 around 8."""
    if step.allocation == "uniform":
        return (step.groups,)
    return tuple(sorted({max(1, round(quarters * step.groups / 4)) for quarters in QUARTERS}))


def shortfall(step: IgqStep, least: float) -> str | None:
    """Why `overhead_max` cannot be met, if it cannot. least: what the fewest groups add, as a share of the products."""
    counts = group_counts(step)
    if step.overhead_max is None or least <= step.overhead_max:
        return None
    return (
        f"{step.overhead_max:.2%} of the bit operations is less than the {least:.2%} that {counts[0]} "
        f"group{'s' if counts[0] > 1 else ''} of every operand take, the fewest around {step.groups}: allow more, or "
        "give fewer groups"
    )


def least_overhead(products: Iterable[Product], step: IgqStep, weight_bits: int) -> float:
    """What the fewest groups that `step` allows add to the bit operations of an image, as a share of these."""
    groups, base, added = group_counts(step)[0], 0, 0
    for p in products:
        left = {"image": IMAGE_BITS, "probabilities": step.softmax_bits or step.bits}.get(p.kind, step.bits)
        right = step.bits if p.kind in ("query", "probabilities") else weight_bits
        base += p.instances * p.rows * p.inner * p.columns * left * right
        added += _grouping(p, groups)
    return added / base


def _grouping(p: Product, groups: int) -> int:
    """Bit operations that finding one operand's grids takes, and adding up its partial sums."""
    if p.kind == "probabilities":
        return FLOAT_BITS * p.instances * p.rows * (p.inner + 2 * groups)
    if p.kind in ("query", "image", "head_input"):
        return 0
    found = 2 * p.rows * p.inner + 4 * groups * p.inner
    return FLOAT_BITS * p.instances * (found + (groups - 1) * p.rows * p.columns)


def check_windows(family: VisionFamily, config: Mapping[str, Any]) -> None:
    """That a Swin's windows fit on its maps: transformers runs no others. Raises SpecError."""
    if not family.hierarchical:
        return
    config = filled(family, config)
    window = size_at(config, "window_size")
    for stage, (height, width) in enumerate(_maps(config)):
        if window > min(height, width):
            raise SpecError(
                "model",
                f"config.json: window_size {window} is more than the {height}x{width} patches of stage {stage}, which "
                "transformers does not run",
            )


def _maps(config: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Height and width of the map of patches in each stage of a Swin; what is no multiple is padded."""
    sides = zip(sides_at(config, "image_size"), sides_at(config, "patch_size"), strict=True)
    height, width = (-(-side // patch) for side, patch in sides)
    for _ in config["depths"]:
        yield height, width
        height, width = -(-height // 2), -(-width // 2)


def products(family: VisionFamily, config: Mapping[str, Any]) -> Iterator[Product]:
    """Every product of an image of the size that config.json names. Raises SpecError."""
    config = filled(family, config)
    width, tokens = stem_width(family, config), token_count(family, config)
    (height, across), patch = sides_at(config, "image_size"), sides_at(config, "patch_size")
    inner = size_at(config, "num_channels") * patch[0] * patch[1]
    if family.hierarchical:
        yield Product("image", 1, tokens, inner, width)
        yield from _stages(config, width)
        width <<= len(config["depths"]) - 1
    else:
        yield Product("image", 1, height * across // (patch[0] * patch[1]), inner, width)
        for _ in range(size_at(config, "num_hidden_layers")):
            yield from _block(family, config, tokens, width)
    yield Product(
        "head_input", 1, 1, 2 * width if family.pooled == "class+mean" else width, class_count(config)
    )


def attentions(family: VisionFamily, config: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    """Heads, tokens and width of a head, of every attention module; Swin's tokens are those of a window."""
    config, width = filled(family, config), stem_width(family, config)
    if family.hierarchical:
        window = size_at(config, "window_size")
        for stage, (depth, heads) in enumerate(stages_of(config)):
            yield from [(heads, window**2, (width << stage) // heads)] * depth
        return
    heads = size_at(config, "num_attention_heads")
    head = size_of(config, "head_dim") or width // heads
    yield from [(heads, token_count(family, config), head)] * size_at(config, "num_hidden_layers")


def _block(family: VisionFamily, config: Mapping[str, Any], tokens: int, width: int) -> Iterator[Product]:
    heads = size_at(config, "num_attention_heads")
    yield from _attention(1, tokens, width, heads, size_of(config, "head_dim") or width // heads)
    yield from _mlp(tokens, width, feed_forward(family, config))


def _stages(config: Mapping[str, Any], width: int) -> Iterator[Product]:
    """Swin's: attention in windows of a padded map, and merging of patches between stages."""
    window = size_at(config, "window_size")
    for stage, ((height, across), (depth, heads)) in enumerate(
        zip(_maps(config), stages_of(config), strict=True)
    ):
        if stage:
            yield Product("post_norm", 1, height * across, 2 * width, width)
        windows = -(-height // window) * -(-across // window)
        for _ in range(depth):
            yield from _attention(windows, window**2, width, heads, width // heads)
            yield from _mlp(height * across, width, scaled(config, width))
        width *= 2


def _attention(instances: int, tokens: int, width: int, heads: int, head: int) -> Iterator[Product]:
    yield Product("post_norm", instances, tokens, width, 3 * heads * head)
    yield Product("query", instances * heads, tokens, head, tokens)
    yield Product("probabilities", instances * heads, tokens, tokens, head)
    yield Product("attention_output", instances, tokens, heads * head, width)


def _mlp(tokens: int, width: int, hidden: int) -> Iterator[Product]:
    yield Product("post_norm", 1, tokens, width, hidden)
    yield Product("post_activation", 1, tokens, hidden, width)
