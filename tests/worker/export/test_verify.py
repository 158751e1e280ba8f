"""The clean process: what it accepts, what it catches, and that it is clean."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from worker.errors import VerificationError
from worker.export import reload
from worker.export.verify import LOADERS, format_of, main, verify

Build = Callable[..., Any]


@pytest.mark.parametrize(("name", "format"), [("mistral", "compressed-tensors"), ("gemma2", "quantry")])
def test_a_good_checkpoint_passes(name: str, format: str, tiny: Build, tmp_path: Path) -> None:
    model = tiny(name, added=".")
    model.export(tmp_path / "source", tmp_path / "out", format)
    result = verify(tmp_path / "out", format, model.reference(tmp_path / "reference.safetensors"))
    assert result["loader"] == LOADERS[format]
    assert float(result["max_abs_difference"]) < 1e-4
    assert result["argmax_agreement"] == 1.0
    assert result["tokens"] == 18


def test_a_wrong_scale_is_caught_and_the_command_says_so(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama")
    model.export(tmp_path / "source", tmp_path / "out", "gptq")
    reference = model.reference(tmp_path / "reference.safetensors")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.scales"][:, 5] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    monkeypatch.setattr(sys, "argv", ["verify", str(tmp_path / "out"), str(reference), "--json"])
    capsys.readouterr()
    assert main() == 1
    assert "(gptq) computes logits that differ by" in json.loads(capsys.readouterr().out)["error"]


def test_a_tensor_without_a_place_is_reported(
    tiny: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stock loaders only warn of a bias that the config has no switch for, and leave it out."""
    model = tiny("llama", added="q_proj")
    kept = "model.layers.1.self_attn.q_proj"
    model.kept[f"{kept}.weight"] = model.layers.pop(kept).weight.dequantize()  # dense: a stock nn.Linear
    model.export(tmp_path / "source", tmp_path / "out", "quantry")
    file = tmp_path / "out" / "model.safetensors"
    tensors = {**load_file(file), f"{kept}.bias": torch.ones(64)}
    save_file(tensors, file, metadata={"format": "pt"})
    capsys.readouterr()
    reference = model.reference(tmp_path / "reference.safetensors")
    assert reload.main(str(tmp_path / "out"), str(reference), "quantry") == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error == f"ValueError: 1 unexpected keys, such as {kept}.bias"


def test_a_truncated_file_is_reported(
    tiny: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("opt")
    model.export(tmp_path / "source", tmp_path / "out", "quantry")
    reference = model.reference(tmp_path / "reference.safetensors")
    capsys.readouterr()
    assert reload.main(str(tmp_path / "out"), str(reference), "quantry") == 0
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert reload.main(str(tmp_path / "out"), str(reference), "quantry") == 1
    good, bad = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert good["argmax_agreement"] == 1.0
    assert bad["error"].startswith("SafetensorError")


def test_nan_is_reported(tiny: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("opt")
    model.kept["model.decoder.final_layer_norm.weight"][0] = torch.nan
    model.export(tmp_path / "source", tmp_path / "out", "quantry")
    reference = tmp_path / "reference.safetensors"
    save_file({"input_ids": torch.ones(1, 4, dtype=torch.int64), "logits": torch.ones(1, 4, 67)}, reference)
    capsys.readouterr()
    assert reload.main(str(tmp_path / "out"), str(reference), "quantry") == 1
    assert "NaN" in json.loads(capsys.readouterr().out)["error"]


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="is not a checkpoint"):
        format_of(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(VerificationError, match="'awq'"):
        format_of(tmp_path)


def test_a_loader_that_dies_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="does not load cleanly"):
        verify(tmp_path / "nothing", "gptq", tmp_path / "no.safetensors", threads=1)
