"""Classifiers as ONNX with quantize and dequantize nodes: ONNX Runtime computes what the simulation does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from quantized_classifiers import MakeGrid, Quantized, build, pixels
from torch import Tensor, nn

from quantry.quantizers.activation import ActivationQuantizer, TokenQuantizer, UniformQuantizer
from quantry.quantizers.affine import QuantizedLayer
from worker.errors import ExportError
from worker.export.onnx_qdq import export_onnx, stored

# torch.export uses a part of torch that it calls deprecated itself
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)`:FutureWarning")
KINDS = {4: {TensorProto.INT4, TensorProto.UINT4}, 8: {TensorProto.INT8, TensorProto.UINT8}}


@pytest.fixture
def quantize(random_layer: MakeGrid, tmp_path: Path) -> Callable[..., Quantized]:
    return partial(build, tmp_path / "source", random_layer=random_layer, activations="tensor")


def write(done: Quantized, file: Path) -> onnx.ModelProto:
    export_onnx(file, done.network, done.layers.items(), done.quantizers, done.probability_bias, (3, 16, 16))
    return onnx.load(file)


def run(file: Path, images: Tensor, *, optimized: bool) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # 4-bit weights are multiplied in float32: by default the runtime would round their inputs to 8 bits
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"pixel_values": images.numpy()})[0])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit", {"bits": 4}),
        ("swin", {"bits": 8, "biases": True}),
        ("dinov2", {"bits": 3, "group_size": 16, "biases": True}),
        ("deit", {"bits": 6, "symmetric": False}),
    ],
)
def test_onnx_runtime_computes_the_same_logits(
    name: str, options: dict[str, Any], quantize: Callable[..., Quantized], tmp_path: Path
) -> None:
    done = quantize(name, **options)
    model = write(done, tmp_path / "model.onnx")
    images = pixels(9)  # another batch than it was traced with
    want = done.logits(images)
    for optimized in (False, True):
        got = run(tmp_path / "model.onnx", images, optimized=optimized)
        worst = (got - want).abs().amax(1)  # of each image: where a code falls to the other side, it shows
        assert worst.median() < 1e-4
        assert worst.max() < 0.3 * want.std()
    held = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    weights = [held[node.input[0]] for node in nodes if node.input[0] in held]
    assert len(weights) == len(done.layers)
    assert set(weights) <= KINDS[4 if options["bits"] <= 4 else 8]
    assert all(not part.metadata_props for part in model.graph.node)


def test_a_table_of_biases_is_added_by_position(quantize: Callable[..., Quantized], tmp_path: Path) -> None:
    done = quantize("vit", activations="none")
    tokens = {"vit.embeddings.patch_embeddings.projection": 16, "vit.layers.1.mlp.fc1": 17, "classifier": 1}
    for name, rows in tokens.items():
        layer = done.layers[name]
        table = torch.randn(rows, len(layer.weight.codes))
        done.layers[name] = QuantizedLayer(layer.weight, layer.bias, position_bias=table)
        added = table.T.view(1, -1, 4, 4) if rows == 16 else table
        done.simulated.get_submodule(name).register_forward_hook(_add(added))
    counts = Counter(node.op_type for node in write(done, tmp_path / "model.onnx").graph.node)
    assert counts["QuantizeLinear"] == 0
    got = run(tmp_path / "model.onnx", pixels(), optimized=True)
    torch.testing.assert_close(got, done.logits(pixels()), atol=1e-4, rtol=1e-4)


def _add(table: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    return lambda module, inputs, output: output + table


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_turned_scales_stand_for_the_same_weights(
    bits: int, group_size: int | None, symmetric: bool, random_layer: MakeGrid
) -> None:
    torch.manual_seed(0)
    weight = random_layer(
        torch.randn(6, 8), bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=torch.float16
    )
    assert bool((weight.scale < 0).any()) == symmetric
    codes, scale, zero = stored(weight)
    assert bool((scale > 0).all())
    assert codes.dtype == zero.dtype == (torch.int8 if symmetric and bits < 8 else torch.uint8)
    size = 8 // scale.shape[1]
    spread = [part.repeat_interleave(size, dim=1) for part in (scale, zero.float())]
    assert torch.equal((codes.float() - spread[1]) * spread[0], weight.dequantize())


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (TokenQuantizer(8), "of kind `token`: only static uniform grids"),
        (UniformQuantizer(8, [4, 1, 1]), "one scale for an activation, not 4"),
        (UniformQuantizer(4, []).fill(zero_point=torch.tensor(7.5)), "integers from 0 to 15"),
        (UniformQuantizer(4, []).fill(zero_point=torch.tensor(16.0)), "integers from 0 to 15"),
    ],
)
def test_what_onnx_cannot_say_is_refused(
    quantizer: ActivationQuantizer, message: str, quantize: Callable[..., Quantized], tmp_path: Path
) -> None:
    done = quantize("vit", activations="none")
    done.quantizers["vit.layers.0.attention.query"] = quantizer
    with pytest.raises(ExportError, match=f"`vit.layers.0.attention.query`: .*{message}"):
        write(done, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
