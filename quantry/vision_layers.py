"""The tensors of an image classifier: names and shapes from its config.json, checked against headers. No torch.

Names are those in memory (transformers 5); most checkpoints have older ones on disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from quantry.base import SpecError
from quantry.checkpoint_checks import check_blocks, check_float, size_of
from quantry.headers import TensorInfo
from quantry.vision import VisionFamily, class_count

Shapes = Iterator[tuple[str, tuple[int, ...]]]

_RENAMED = (  # names on disk -> names in memory
    (r"^(vit|deit)\.encoder\.layer\.(\d+)\.", r"\1.layers.\2."),
    (r"\.attention\.(attention|self)\.(query|key|value)\.", lambda m: f".attention.{m[2][0]}_proj."),
    (r"\.attention\.self\.(?=relative_position_bias_table$)", ".attention.relative_position_bias."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(\d)\.output\.dense\.", r"\1.mlp.fc2."),
)  # fmt: skip
UNREAD = (
    re.compile(  # a buffer of old checkpoints, and what pretraining leaves behind: classifiers use neither
        r"\.relative_position_index$|\.pooler\.dense\.(weight|bias)$"
    )
)
_QUANTIZED = re.compile(
    r"(attention\.[qkvo]_proj|mlp\.fc[12]|downsample\.reduction|^classifier|patch_embeddings\.projection)\.weight$"
)
_COLUMNAR = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
}
_DEFAULTS: dict[str, dict[str, Any]] = {  # of transformers' config classes
    "vit": _COLUMNAR,
    "deit": _COLUMNAR,
    "dinov2": {**_COLUMNAR, "patch_size": 14, "mlp_ratio": 4},
    "swin": {
        "embed_dim": 96,
        "depths": [2, 2, 6, 2],
        "num_heads": [3, 6, 12, 24],
        "window_size": 7,
        "mlp_ratio": 4.0,
        "image_size": 224,
        "patch_size": 4,
        "num_channels": 3,
    },
}


def tensors_in_memory(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors that the model reads, by their name in memory."""
    return {_in_memory(name): info for name, info in tensors.items() if not UNREAD.search(name)}


def is_quantized(name: str) -> bool:
    """Whether a tensor is the weight of a layer that is quantized."""
    return bool(_QUANTIZED.search(name))


def check_tensors(family: VisionFamily, config: Mapping[str, Any], named: Mapping[str, TensorInfo]) -> None:
    """That the tensors are those of the network, floating-point and of its shapes, with none left over.

    Args: named: by name in memory. Raises SpecError, naming the tensor.
    """
    if not family.hierarchical:
        pattern = re.compile(re.escape(family.layers) + r"\.(\d+)\.")
        found = {int(match.group(1)) for name in named if (match := pattern.match(name))}
        check_blocks(size_at(filled(family, config), "num_hidden_layers"), found)
    seen = set()
    for name, shape in tensor_shapes(family, config):
        if name not in named:
            raise SpecError(
                "model", f"the checkpoint lacks {name}, which a {family.architecture} of its config.json has"
            )
        if named[name].shape != shape:
            raise SpecError(
                "model", f"{name} has the shape {list(named[name].shape)}, config.json makes it {list(shape)}"
            )
        check_float(name, named[name])
        seen.add(name)
    other = next((name for name in named if name not in seen), None)
    if other is not None:
        raise SpecError(
            "model", f"the checkpoint holds {other}, which a {family.architecture} of its config.json has not"
        )


def tensor_shapes(family: VisionFamily, config: Mapping[str, Any]) -> Shapes:
    """Name in memory and shape of every tensor of the network, one after the other. Raises SpecError.

    The sizes are a stranger's: nothing is built from them but what is asked for.
    """
    config = filled(family, config)
    width = stem_width(family, config)
    yield f"{family.stem}.weight", (width, size_at(config, "num_channels"), *sides_at(config, "patch_size"))
    yield f"{family.stem}.bias", (width,)
    yield from _embeddings(family, config, width)
    if family.hierarchical:
        for stage, (depth, heads) in enumerate(stages_of(config)):
            yield from _stage(f"{family.layers}.{stage}", config, width, depth, heads)
            if stage + 1 < len(config["depths"]):
                yield from _merging(f"{family.layers}.{stage}.downsample", width)
                width *= 2
    else:
        for block in range(size_at(config, "num_hidden_layers")):
            yield from _block(f"{family.layers}.{block}", family, config, width)
    yield from _norm(family.norm, width)
    inputs = 2 * width if family.pooled == "class+mean" else width
    yield from _linear("classifier", class_count(config), inputs)


def stem_width(family: VisionFamily, config: Mapping[str, Any]) -> int:
    """Width of the tokens that enter the first block. Raises SpecError."""
    return size_at(filled(family, config), "embed_dim" if family.hierarchical else "hidden_size")


def token_count(family: VisionFamily, config: Mapping[str, Any]) -> int:
    """Tokens of an image in the first block; Swin pads what is no multiple of a patch. Raises SpecError."""
    config = filled(family, config)
    sides = zip(sides_at(config, "image_size"), sides_at(config, "patch_size"), strict=True)
    height, width = (-(-side // patch) if family.hierarchical else side // patch for side, patch in sides)
    return height * width + len(family.special_tokens)


def channel_count(family: VisionFamily, config: Mapping[str, Any]) -> int:
    """Channels of an image as the network takes it. Raises SpecError."""
    return size_at(filled(family, config), "num_channels")


def pixel_count(family: VisionFamily, config: Mapping[str, Any]) -> int:
    """Values of an image as the network takes it, all channels. Raises SpecError."""
    height, width = sides_at(filled(family, config), "image_size")
    return channel_count(family, config) * height * width


def block_values(family: VisionFamily, config: Mapping[str, Any]) -> int:
    """Values of the largest tensor in the first block, for an image: its attention or its feed-forward network.

    Raises SpecError.
    """
    tokens, config = token_count(family, config), filled(family, config)
    if family.hierarchical:
        _, heads = next(stages_of(config))
        return tokens * max(heads * size_at(config, "window_size") ** 2, feed_forward(family, config))
    return tokens * max(size_at(config, "num_attention_heads") * tokens, feed_forward(family, config))


def _embeddings(family: VisionFamily, config: Mapping[str, Any], width: int) -> Shapes:
    """What is added to the embedded patches."""
    place = f"{family.base}.embeddings"
    height, across = (
        side // patch
        for side, patch in zip(sides_at(config, "image_size"), sides_at(config, "patch_size"), strict=True)
    )
    positions = height * across + len(family.special_tokens)
    if family.hierarchical:
        yield from _norm(f"{place}.norm", width)
        if config.get("use_absolute_embeddings", False):
            yield f"{place}.position_embeddings", (1, positions, width)
        return
    for name in family.special_tokens:
        yield f"{place}.{name}", (1, 1, width)
    if family.model_type == "dinov2" and config.get("use_mask_token", True):
        yield f"{place}.mask_token", (1, width)
    yield f"{place}.position_embeddings", (1, positions, width)


def _block(name: str, family: VisionFamily, config: Mapping[str, Any], width: int) -> Shapes:
    heads = size_at(config, "num_attention_heads")
    inner = heads * (size_of(config, "head_dim") or width // heads)
    yield from _attention(f"{name}.attention", config, width, inner)
    for norm in family.norms:
        yield from _norm(f"{name}.{norm}", width)
    yield from _mlp(f"{name}.mlp", width, feed_forward(family, config))
    if family.model_type == "dinov2":
        yield f"{name}.layer_scale1.lambda1", (width,)
        yield f"{name}.layer_scale2.lambda1", (width,)


def _stage(name: str, config: Mapping[str, Any], width: int, depth: int, heads: int) -> Shapes:
    window = size_at(config, "window_size")
    for block in range(depth):
        place = f"{name}.blocks.{block}"
        yield from _attention(f"{place}.attention", config, width, width)
        table = f"{place}.attention.relative_position_bias.relative_position_bias_table"
        yield table, ((2 * window - 1) ** 2, heads)
        yield from _norm(f"{place}.layernorm_before", width)
        yield from _norm(f"{place}.layernorm_after", width)
        yield from _mlp(f"{place}.mlp", width, scaled(config, width))


def _attention(name: str, config: Mapping[str, Any], width: int, inner: int) -> Shapes:
    for layer in ("q_proj", "k_proj", "v_proj"):
        yield from _linear(f"{name}.{layer}", inner, width, bias=bool(config.get("qkv_bias", True)))
    yield from _linear(f"{name}.o_proj", width, inner)


def _mlp(name: str, width: int, inner: int) -> Shapes:
    yield from _linear(f"{name}.fc1", inner, width)
    yield from _linear(f"{name}.fc2", width, inner)


def _merging(name: str, width: int) -> Shapes:
    yield from _linear(f"{name}.reduction", 2 * width, 4 * width, bias=False)
    yield from _norm(f"{name}.norm", 4 * width)


def _linear(name: str, rows: int, columns: int, *, bias: bool = True) -> Shapes:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _in_memory(name: str) -> str:
    """The tensor's name in memory, from the name on disk."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def filled(family: VisionFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with transformers' own sizes where it leaves some out."""
    return {**_DEFAULTS[family.model_type], **config}


def size_at(config: Mapping[str, Any], key: str) -> int:
    """A size that must be there. Raises SpecError."""
    value = size_of(config, key)
    if value is None:
        raise SpecError("model", f"config.json: {key} is null, not a positive whole number")
    return value


def sides_at(config: Mapping[str, Any], key: str) -> tuple[int, int]:
    """Height and width of a size that may be one number or two."""
    value = config[key]
    pair = value if isinstance(value, list) else [value, value]
    if len(pair) != 2:
        raise SpecError("model", f"config.json: {key} is {value!r}, not a height and a width")
    return size_at({key: pair[0]}, key), size_at({key: pair[1]}, key)


def stages_of(config: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Blocks and attention heads of each stage."""
    depths, heads = config["depths"], config["num_heads"]
    if not (isinstance(depths, list) and isinstance(heads, list) and 0 < len(depths) <= len(heads)):
        raise SpecError(
            "model", "config.json: depths and num_heads are not lists with a number for each stage"
        )
    for depth, count in zip(depths, heads, strict=False):
        yield size_at({"depths": depth}, "depths"), size_at({"num_heads": count}, "num_heads")


def feed_forward(family: VisionFamily, config: Mapping[str, Any]) -> int:
    """Width of the feed-forward network in the first block."""
    if "mlp_ratio" in _DEFAULTS[family.model_type]:
        return scaled(config, stem_width(family, config))
    return size_at(config, "intermediate_size")


def scaled(config: Mapping[str, Any], width: int) -> int:
    """Width of a feed-forward network that is a multiple of the block's."""
    ratio = config["mlp_ratio"]
    if type(ratio) not in (int, float) or not 0 < ratio < 1000:
        raise SpecError("model", f"config.json: mlp_ratio is {ratio!r}, not a positive number")
    return int(width * ratio)
