"""`import quantry` and `quantry.load`, as a user of an artifact meets them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import factories
import pytest
import torch
from safetensors.torch import load_file, save_file

import quantry
from quantry.checkpoint import CheckpointError, check_files
from quantry.hf import QuantryConfig
from worker.export import write_manifest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models() -> ModuleType:
    """The tiny models of the export tests."""
    file = ROOT / "tests" / "worker" / "export" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_models", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_models"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(models: ModuleType, tmp_path: Path) -> Path:
    models.build("llama", added=".").export(tmp_path / "source", tmp_path / "out", "quantry")
    write_manifest(tmp_path / "out", format="quantry", job=None)
    return tmp_path / "out"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_quantry_imports_neither_torch_nor_transformers() -> None:
    heavy = ("torch", "transformers", "safetensors", "numpy")
    code = f"import sys, quantry; print([name for name in {heavy} if name in sys.modules])"
    assert run_python(code) == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import quantry; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import transformers.quantizers.auto; import quantry",
    ],
)
def test_both_orders_of_import_work(imports: str, folder: Path) -> None:
    code = f"{imports}\nmodel = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
    code += "print(type(model.model.layers[0].mlp.up_proj).__name__, type(model).__name__)\n"
    code += "import sys; print([f for f in sys.meta_path if type(f).__module__.startswith('quantry')])"
    assert run_python(code).splitlines() == ["QuantizedLinear LlamaForCausalLM", "[]"]


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_a_bias_per_position_follows_the_cache_and_the_padding(
    name: str, models: ModuleType, tmp_path: Path
) -> None:
    """Tokens one by one, or padded on the left, must meet the same biases as the whole text at once."""
    model = models.build(name, positions=6)
    model.export(tmp_path / "source", tmp_path / "out", "quantry")
    loaded = quantry.load(tmp_path / "out", dtype=torch.float32).eval()
    text = models.token_ids()[:1]  # 9 tokens: the last three lie beyond the table
    with torch.no_grad():
        whole = loaded(input_ids=text, use_cache=False).logits
        cache, steps = None, []
        for position in range(text.shape[1]):
            logits, cache = factories.next_token(loaded, text[:, position : position + 1], cache)
            steps.append(logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-5)
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), text], dim=1)
        mask = torch.tensor([[0] * 3 + [1] * text.shape[1]])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        got = loaded(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(got[:, 3:], whole, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="bias per position"):
        quantry.load(tmp_path / "out", dequantize=True)


def test_a_bias_per_position_is_added_where_it_belongs(models: ModuleType, tmp_path: Path) -> None:
    model = models.build("llama", positions=6)
    model.export(tmp_path / "source", tmp_path / "out", "quantry")
    loaded = quantry.load(tmp_path / "out", dtype=torch.float32).eval()
    text = models.token_ids()[:, :8]

    def add(table: torch.Tensor) -> Callable[..., torch.Tensor]:
        rows = torch.cat([table, table.mean(0).expand(2, -1)])  # past its end the mean row
        return lambda module, inputs, output: output + rows

    for name, layer in model.layers.items():
        model.model.get_submodule(name).register_forward_hook(add(layer.position_bias))
    with torch.no_grad():
        got = loaded(input_ids=text, use_cache=False).logits
    torch.testing.assert_close(got, model.logits(text), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "quantry"])
def test_load_opens_every_format(format: str, models: ModuleType, tmp_path: Path) -> None:
    model = models.build("qwen2", added=".")
    model.export(tmp_path / "source", tmp_path / "out", format)
    ids = models.token_ids()
    with torch.no_grad():
        got = quantry.load(str(tmp_path / "out"), dtype=torch.float32).eval()(input_ids=ids).logits
    torch.testing.assert_close(got, model.logits(ids), atol=1e-5, rtol=1e-5)


def test_what_is_cut_short_or_missing_or_changed_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    changed = bytearray(content)
    changed[-1] ^= 1
    file.write_bytes(changed)
    check_files(folder)  # sizes alone do not see it
    with pytest.raises(CheckpointError, match=r"model\.safetensors has another sha256"):
        check_files(folder, digests=True)
    file.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes, the manifest says \d+"):
        quantry.load(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        quantry.load(folder)
    with pytest.raises(CheckpointError, match="is not a folder"):
        quantry.load(folder / "nowhere")


def test_tensors_left_out_or_left_over_are_errors(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.extra": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected keys, such as model\.extra"):
        quantry.load(folder)
    tensors.pop("model.layers.0.mlp.up_proj.bias")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys, such as model\.layers\.0\.mlp\.up_proj\.bias"):
        quantry.load(folder)


def test_a_config_that_makes_no_sense_is_refused(folder: Path) -> None:
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]

    def read(**changes: Any) -> QuantryConfig:
        return QuantryConfig.from_dict({**stored, **changes})

    assert read().layer_format("model.layers.0.mlp.up_proj").bits == 4
    with pytest.raises(ValueError, match="format version 9, this quantry reads 1"):
        read(format_version=9)
    with pytest.raises(ValueError, match="x: unknown keys"):
        read(layers={"x": {"wat": 1}}).layer_format("x")
    with pytest.raises(ValueError, match="scale_dtype 'int4'"):
        read(layers={"x": {"scale_dtype": "int4"}}).layer_format("x")


def test_saving_a_packed_model_keeps_it_packed(models: ModuleType, folder: Path, tmp_path: Path) -> None:
    first = quantry.load(folder, dtype=torch.float32).eval()
    first.save_pretrained(tmp_path / "again")
    second = quantry.load(tmp_path / "again", dtype=torch.float32).eval()
    ids = models.token_ids()
    with torch.no_grad():
        torch.testing.assert_close(second(ids).logits, first(ids).logits, atol=0, rtol=0)
