"""Classifiers of every family, quantized in memory, written and read back: the logits must be the same."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_classifiers import MakeGrid, Quantized, build, pixels
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

import quantry
from quantry.layers.conv import QuantizedConv2d
from quantry.layers.linear import QuantizedLinear
from quantry.layers.operands import ATTENTION, attached
from quantry.quantizers.activation import ActivationQuantizer
from quantry.quantizers.affine import QuantizedLayer
from worker.errors import ExportError
from worker.export import reload, write_manifest
from worker.export.verify import verify

FAMILIES = ["vit", "deit", "dinov2", "swin"]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def quantize(random_layer: MakeGrid, tmp_path: Path) -> Callable[..., Quantized]:
    return partial(build, tmp_path / "source", random_layer=random_layer)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_clean_process_computes_the_same_logits(
    name: str, quantize: Callable[..., Quantized], tmp_path: Path
) -> None:
    done = quantize(name, biases=True)
    done.write(tmp_path / "out")
    result = verify(tmp_path / "out", "quantry", done.reference(tmp_path / "reference.safetensors"))
    assert float(result["max_abs_difference"]) < 1e-5
    assert result["argmax_agreement"] == 1.0
    assert result["images"] == 3


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("bits", [3, 8])
def test_layers_stay_packed_and_attention_ours_and_saving_again_changes_nothing(
    name: str, bits: int, quantize: Callable[..., Quantized], tmp_path: Path
) -> None:
    done = quantize(name, bits=bits, symmetric=bits == 8, biases=bits == 8)
    manifest = done.write(tmp_path / "out")
    write_manifest(tmp_path / "out", format="quantry", job=None, known=manifest.files)
    loaded: Any = quantry.load(tmp_path / "out")
    packed = {n: type(m) for n, m in loaded.named_modules() if isinstance(m, QuantizedLinear)}
    assert packed.keys() == done.layers.keys()
    assert [n for n, kind in packed.items() if kind is QuantizedConv2d] == [next(iter(done.layers))]
    assert loaded.config._attn_implementation == ATTENTION
    described = {n: q.describe() for n, q in done.quantizers.items()}
    assert {n: q.describe() for n, q in attached(loaded)} == described
    want = done.logits(pixels())
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels()).logits, want, atol=1e-5, rtol=0)
    loaded.save_pretrained(tmp_path / "again")
    again: Any = quantry.load(tmp_path / "again")
    assert again.config._attn_implementation == ATTENTION
    with torch.no_grad():
        torch.testing.assert_close(again(pixels()).logits, loaded(pixels()).logits, atol=0, rtol=0)


def test_import_and_the_auto_class_are_enough(quantize: Callable[..., Quantized], tmp_path: Path) -> None:
    done = quantize("vit")
    done.write(tmp_path / "out")
    torch.save(pixels(), tmp_path / "pixels.pt")
    code = (
        "import quantry, torch\nfrom transformers import AutoModelForImageClassification\n"
        f"model = AutoModelForImageClassification.from_pretrained({str(tmp_path / 'out')!r})\n"
        f"print(model(torch.load({str(tmp_path / 'pixels.pt')!r})).logits.tolist())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    got = torch.tensor(json.loads(ran.stdout))
    torch.testing.assert_close(got, done.logits(pixels()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_in_the_file_are_those_of_save_pretrained(
    name: str, quantize: Callable[..., Quantized], tmp_path: Path
) -> None:
    done = quantize(name)
    done.write(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    with safe_open(done.source / "model.safetensors", framework="pt") as file:
        stock = set(file.keys())
    assert stock - names == {n.replace("_packed", "") for n in names if n.endswith(".weight_packed")}
    assert {n for n in names - stock if "quantizer" not in n and ".operands." not in n} == {
        n for n in names if n.endswith((".weight_packed", ".weight_scale"))
    }


def test_other_dtypes_keep_grids_exact(quantize: Callable[..., Quantized], tmp_path: Path) -> None:
    """Scales stay what they are in a model loaded in half the digits, and it runs."""
    done = quantize("dinov2", biases=True)
    done.write(tmp_path / "out")
    loaded: Any = quantry.load(tmp_path / "out", dtype=torch.bfloat16)
    for operand, quantizer in attached(loaded):
        for key, value in quantizer.state_dict().items():
            assert torch.equal(value, done.quantizers[operand].state_dict()[key])
    with torch.no_grad():
        assert loaded(pixels().bfloat16()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bias_per_position_is_that_of_the_token(
    name: str, quantize: Callable[..., Quantized], tmp_path: Path
) -> None:
    done = quantize(name, activations="none")
    outputs: dict[str, tuple[int, ...]] = {}
    for layer in done.layers:
        done.simulated.get_submodule(layer).register_forward_hook(_record(outputs, layer))
    done.logits(pixels())
    for layer, quantized in done.layers.items():
        shape = outputs[layer]
        rows = shape[2] * shape[3] if len(shape) == 4 else shape[1] if len(shape) == 3 else 1
        table = torch.randn(rows, len(quantized.weight.codes)) * 0.1
        done.layers[layer] = QuantizedLayer(quantized.weight, quantized.bias, position_bias=table)
        added = table.T.view(1, -1, *shape[2:]) if len(shape) == 4 else table
        done.simulated.get_submodule(layer).register_forward_hook(_add(added))
    done.write(tmp_path / "out")
    loaded: Any = quantry.load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels()).logits, done.logits(pixels()), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="bias per position"):
        quantry.load(tmp_path / "out", dequantize=True)


def _record(shapes: dict[str, tuple[int, ...]], name: str) -> Callable[..., None]:
    """Note the shape of a layer's output."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shapes[name] = tuple(output.shape)

    return hook


def _add(table: Tensor) -> Callable[..., Tensor]:
    return lambda module, inputs, output: output + table


def test_dense_layers_where_nothing_quantizes_activations(
    quantize: Callable[..., Quantized], tmp_path: Path
) -> None:
    done = quantize("swin", activations="none")
    done.write(tmp_path / "out")
    dense: Any = quantry.load(tmp_path / "out", dequantize=True)
    assert not any(isinstance(m, QuantizedLinear) for m in dense.modules())
    with torch.no_grad():
        torch.testing.assert_close(dense(pixels()).logits, done.logits(pixels()), atol=1e-5, rtol=0)


def test_what_would_leave_quantizers_out_is_refused(
    quantize: Callable[..., Quantized], tmp_path: Path
) -> None:
    quantize("vit").write(tmp_path / "out")
    with pytest.raises(ValueError, match="leave `attn_implementation` out"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "out", attn_implementation="sdpa")
    with pytest.raises(ValueError, match="keep it packed"):
        quantry.load(tmp_path / "out", dequantize=True)
    loaded: Any = quantry.load(tmp_path / "out")
    loaded.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match=r'set_attn_implementation\("quantry"\)'):
        loaded(pixels())


def test_the_base_alone_has_its_part(quantize: Callable[..., Quantized], tmp_path: Path) -> None:
    done = quantize("vit")
    done.write(tmp_path / "out")
    base = AutoModel.from_pretrained(tmp_path / "out", add_pooling_layer=False)
    with torch.no_grad():
        want = done.simulated.vit(pixels()).last_hidden_state
        torch.testing.assert_close(base(pixels()).last_hidden_state, want, atol=1e-5, rtol=0)


def test_the_folder_says_what_it_is(quantize: Callable[..., Quantized], tmp_path: Path) -> None:
    done = quantize("deit")
    manifest = done.write(tmp_path / "out")
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").image_mean == (0.5, 0.5, 0.5)
    assert "AutoModelForImageClassification" in manifest.loader.snippet
    assert "pipeline_tag: image-classification" in (tmp_path / "out" / "README.md").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["DeiTForImageClassification"]
    assert config["quantization_config"]["activations"]["classifier.input"]["kind"] == "uniform"


def test_what_does_not_fit_the_network_is_refused(quantize: Callable[..., Quantized], tmp_path: Path) -> None:
    done = quantize("vit")
    good = next(iter(done.layers.values()))
    quantizer = next(iter(done.quantizers.values()))
    wrong = [
        ({"layers": {"vit.nothing": good}}, "`vit.nothing` is no linear layer"),
        ({"layers": {"classifier": good}}, r"`classifier`: codes of shape \(32, 48\), expected \(5, 32\)"),
        ({"quantizers": {"vit.nothing.input": quantizer}}, "quantizer is given for `vit.nothing`"),
        ({"quantizers": {"classifier.weight": quantizer}}, "`classifier.weight` is not an operand"),
        ({"quantizers": {"classifier.input": _broken(quantizer)}}, "NaN or infinity"),
        ({"network": done.simulated}, "carries quantizers already"),
    ]
    for number, (changes, message) in enumerate(wrong):
        with pytest.raises(ExportError, match=message):
            Quantized(**{**vars(done), **changes}).write(tmp_path / f"out{number}")
        assert list((tmp_path / f"out{number}").iterdir()) == []


def _broken(quantizer: ActivationQuantizer) -> ActivationQuantizer:
    broken = copy.deepcopy(quantizer)
    return broken.fill(scale=torch.tensor(torch.nan))


def test_another_grid_is_caught(
    quantize: Callable[..., Quantized], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = quantize("vit")
    reference = done.reference(tmp_path / "reference.safetensors")
    done.quantizers["vit.layers.0.mlp.fc2.input"].get_buffer("scale").mul_(1.5)
    done.write(tmp_path / "out")
    capsys.readouterr()
    assert reload.main(str(tmp_path / "out"), str(reference), "quantry") == 0
    assert json.loads(capsys.readouterr().out)["max_abs_difference"] > 1e-3
