"""A quantized image classifier as ONNX, its grids in QuantizeLinear and DequantizeLinear nodes.

ONNX says x_q = saturate(round(x / scale) + zero_point), which holds static uniform grids: of weights per channel or
group; of layers' inputs and of operands of attention per tensor (along an axis too, but ONNX Runtime's integer
products fail on that). Everything else, grids found at run time among it, is refused. Ties round otherwise than
in `UniformQuantizer`, which adds the zero-point first.

Opset 21, which brought 4-bit integers and blocks: codes of weights up to 4 bits are stored in 4, others in 8; an
activation of 4 bits is one of 4 in the graph, any other one of 8, clipped before it is rounded. Where 4-bit
weights meet an input without a grid, ONNX Runtime rounds that input to 8 bits, unless it is told not to
(session.qdq_matmulnbits_accuracy_level = 1).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxscript import opset21 as op
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from transformers import AttentionInterface

from quantry.layers.operands import CLOSED, AttentionOperands, attach, attached, set_probability_bias
from quantry.quantizers.activation import ActivationQuantizer, UniformQuantizer
from quantry.quantizers.affine import QuantizedLayer, QuantizedWeight
from worker.errors import ExportError
from worker.export.files import write_bytes

OPSET = 21
ATTENTION = "quantry_onnx"  # attention as below, without what cannot be traced


def export_onnx(
    file: Path,
    network: Any,
    layers: Iterable[tuple[str, QuantizedLayer]],
    quantizers: Mapping[str, ActivationQuantizer],
    probability_bias: Mapping[str, Tensor],
    image_shape: tuple[int, int, int],
) -> None:
    """Write one file: `pixel_values` float32 (batch, C, H, W) to `logits` (batch, classes), any batch.

    Args: as of `worker.export.vision.write_vision`; image_shape: (C, H, W), which is fixed in the graph.
    Raises: ExportError naming the first thing that ONNX has no nodes for.
    """
    if any(attached(network)):
        raise ExportError("the network carries quantizers already: detach them, they are given apart")
    traced = copy.deepcopy(network).float().cpu().eval()
    for name, layer in layers:
        traced.set_submodule(name, _Layer(name, traced.get_submodule(name), layer))
    for operand, quantizer in quantizers.items():
        attach(traced, operand, _StaticGrid(operand, quantizer))
    for attention, bias in probability_bias.items():
        set_probability_bias(traced, attention, bias.cpu())
    traced.set_attn_implementation(ATTENTION)
    pixels = torch.zeros(2, *image_shape)  # a batch of 1 would be taken for a constant
    program = torch.onnx.export(
        _Logits(traced).eval(),
        (pixels,),
        input_names=["pixel_values"],
        output_names=["logits"],
        opset_version=OPSET,
        dynamic_shapes=({0: "batch"},),
        custom_translation_table=_TRANSLATIONS,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    _narrow_weights(model.graph)
    for part in (*model.graph.node, *model.graph.value_info):
        del part.metadata_props[:]  # where in the code it comes from, with the folders of this machine
    onnx.checker.check_model(model)
    write_bytes(file, model.SerializeToString())


class _Logits(nn.Module):
    """A classifier that returns its logits alone."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values).logits
        return logits


class _Layer(nn.Module):
    """A linear layer or convolution whose weight is a `dequantize` of integers."""

    def __init__(self, name: str, dense: nn.Module, layer: QuantizedLayer) -> None:
        super().__init__()
        if not isinstance(dense, nn.Linear | nn.Conv2d):
            raise ExportError(f"layer `{name}` is no linear layer or convolution of the network")
        codes, scale, zero_point = stored(layer.weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.float().cpu())
        table = layer.position_bias
        self.register_buffer("position_bias", None if table is None else table.float().cpu())
        self.name, self.shape = name, tuple(dense.weight.shape)
        self.geometry: tuple[Any, ...] | None = None  # of a convolution
        if isinstance(dense, nn.Conv2d):
            self.geometry = (dense.stride, dense.padding, dense.dilation, dense.groups)
        self.group_size = layer.weight.group_size or 0

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    position_bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        made: Tensor = _dequantize(self.codes, self.scale, self.zero_point, self.group_size)
        return made.view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.geometry is None:
            y = linear(x, self.weight, self.bias)
        else:
            y = conv2d(x, self.weight, self.bias, *self.geometry)
        return y if self.position_bias is None else y + self._rows(y)

    def _rows(self, y: Tensor) -> Tensor:
        """The bias of each token of y, an output (..., tokens, out), (batch, out) or (batch, out, h, w)."""
        assert self.position_bias is not None
        tokens = y.shape[2] * y.shape[3] if y.dim() == 4 else y.shape[1] if y.dim() == 3 else 1
        if tokens > len(self.position_bias):
            raise ExportError(
                f"layer `{self.name}` sees {tokens} tokens and has biases for {len(self.position_bias)}"
            )
        rows = self.position_bias[:tokens]
        return rows.T.reshape(1, -1, y.shape[2], y.shape[3]) if y.dim() == 4 else rows


def stored(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in), scale (out, groups) float32 > 0, and zero_point (out, groups), of the codes' type.

    Symmetric: int8, around 0; of 8 bits uint8, around 128, since processors without VNNI add products of a uint8
    input and two int8 weights in 16 bits, where they overflow. A negative scale s is turned by
    s (q - z) = |s| (q' - z') with q' = 2^b - 1 - q and z' alike, so that its zero-point is one less.
    """
    scale, codes, zero = weight.scale.float().cpu(), weight.codes.cpu(), weight.zero_point.cpu()
    top, half = 2**weight.bits - 1, 2 ** (weight.bits - 1)
    turned = (scale < 0).repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
    q = torch.where(turned, top - codes.to(torch.int16), codes)
    z = torch.where(scale < 0, top - zero.to(torch.int16), zero)
    if weight.symmetric and weight.bits < 8:
        return (q - half).to(torch.int8), scale.abs(), (z - half).to(torch.int8)
    return q.to(torch.uint8), scale.abs(), z.to(torch.uint8)


class _StaticGrid(nn.Module):
    """A UniformQuantizer, its parameters as constants of the graph. Raises ExportError for any other kind."""

    def __init__(self, operand: str, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        if type(quantizer) is not UniformQuantizer:
            raise ExportError(
                f"`{operand}`: ONNX has no nodes for a quantizer of kind `{quantizer.kind}`: only static uniform "
                "grids can be exported, of the step `uniform` with granularity `tensor`"
            )
        zero, top = quantizer.zero_point.cpu(), 2**quantizer.bits - 1
        if not bool(((zero == zero.round()) & (zero >= 0) & (zero <= top)).all()):
            raise ExportError(f"`{operand}`: ONNX needs zero-points that are integers from 0 to {top}")
        if zero.numel() != 1:
            raise ExportError(
                f"`{operand}`: ONNX Runtime takes one scale for an activation, not {zero.numel()}: quantize per tensor"
            )
        self.scale, self.zero_point, self.bits = float(quantizer.scale), int(zero), quantizer.bits

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _fake_quantize(x, self.scale, self.zero_point, self.bits)
        return found


@torch.library.custom_op("quantry::dequantize", mutates_args=())
def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int) -> Tensor:
    """scale * (codes - zero_point), (out, in); scale and zero_point (out, groups). group_size 0: per channel."""
    grouped = codes.float().view(len(codes), scale.shape[1], -1)
    values = (grouped - zero_point.float().unsqueeze(-1)) * scale.unsqueeze(-1)
    return values.view(codes.shape)


@_dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@torch.library.custom_op("quantry::fake_quantize", mutates_args=())
def _fake_quantize(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    return ((x / scale).round().add(zero_point).clamp(0, 2**bits - 1) - zero_point) * scale


@_fake_quantize.register_fake
def _(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    return torch.empty_like(x)


def _dequantize_node(codes: Any, scale: Any, zero_point: Any, group_size: int) -> Any:
    if group_size:
        return op.DequantizeLinear(codes, scale, zero_point, axis=1, block_size=group_size)
    flat: Any = op.Constant(value_ints=[-1])
    return op.DequantizeLinear(codes, op.Reshape(scale, flat), op.Reshape(zero_point, flat), axis=0)


def _quantize_nodes(x: Any, scale: float, zero_point: int, bits: int) -> Any:
    """QuantizeLinear and DequantizeLinear, clipped before where the grid has fewer steps than its container.

    Not 2 or 3 bits in a container of 4: ONNX Runtime (1.31) fails on a Clip before it.
    """
    if bits not in (4, 8):
        low, high = -zero_point * scale, (2**bits - 1 - zero_point) * scale
        x = op.Clip(x, _scalar(TensorProto.FLOAT, low), _scalar(TensorProto.FLOAT, high))
    step = _scalar(TensorProto.FLOAT, scale)
    zero = _scalar(TensorProto.UINT4 if bits == 4 else TensorProto.UINT8, zero_point)
    return op.DequantizeLinear(op.QuantizeLinear(x, step, zero), step, zero)


def _scalar(kind: int, value: float) -> Any:
    return op.Constant(value=helper.make_tensor("value", kind, [], [value]))


_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.quantry.dequantize.default: _dequantize_node,
    torch.ops.quantry.fake_quantize.default: _quantize_nodes,
}


def _narrow_weights(graph: Any) -> None:
    """Store the codes of weights, and their zero-points, in 4 bits where they fit."""
    held = {tensor.name: tensor for tensor in graph.initializer}
    narrow = {TensorProto.INT8: (ml_dtypes.int4, -8, 7), TensorProto.UINT8: (ml_dtypes.uint4, 0, 15)}
    for node in graph.node:
        names = [node.input[0], *node.input[2:3]] if node.op_type == "DequantizeLinear" else []
        if not names or any(name not in held for name in names):
            continue
        kind, low, high = narrow.get(held[names[0]].data_type, (None, 0, 0))
        values = [numpy_helper.to_array(held[name]) for name in names]
        if kind is None or any(v.min() < low or v.max() > high for v in values):
            continue
        for place, name, value in zip((0, 2), names, values, strict=False):
            node.input[place] = f"{name}_4bit"
            if node.input[place] not in held:
                held[node.input[place]] = numpy_helper.from_array(value.astype(kind), node.input[place])
    used = {name for node in graph.node for name in node.input}
    del graph.initializer[:]
    graph.initializer.extend(tensor for name, tensor in held.items() if name in used)


def _traced_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """`quantry.layers.operands.quantized_attention` of a classifier, without branches on values.

    A closed key's probability underflows to 0, which every grid here holds: only the bias needs the mask.
    """
    operands: AttentionOperands | None = getattr(module, "operands", None)
    if operands is not None:
        query, key, value = (
            operands.apply_to("query", query),
            operands.apply_to("key", key),
            operands.apply_to("value", value),
        )
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    p = scores.softmax(-1)
    if operands is not None:
        valid = None if attention_mask is None else (attention_mask > CLOSED).to(p.dtype)
        p = operands.probabilities_of(p, valid if operands.probability_bias is not None else None)
    return (p @ value).transpose(1, 2).contiguous(), p


AttentionInterface.register(ATTENTION, _traced_attention)
