"""GGUF files, read by gguf's own reader, by transformers and by `quantry.load`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantry
from worker.errors import ExportError

Build = Callable[..., Any]
TEXT = ["the cat sat on the mat", "a dog ate the hat", "12 mats and 345 hats", "it's naïve"] * 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level tokenizer of 67 tokens or less, trained here."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>", "</s>"], initial_alphabet=[])
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def run(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits


@pytest.mark.parametrize(("bits", "kind"), [(4, "Q4_0"), (8, "Q8_0")])
def test_both_readers_compute_the_same(
    bits: int, kind: str, tiny: Build, source: Path, ids: Tensor, tmp_path: Path
) -> None:
    model = tiny("llama", bits=bits)
    model.export(source, tmp_path, "gguf")
    file = f"model-{kind}.gguf"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file, dtype=torch.float32)
    torch.testing.assert_close(run(stock, ids), model.logits(ids), atol=1e-5, rtol=1e-5)
    ours = quantry.load(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(run(ours, ids), model.logits(ids), atol=1e-5, rtol=1e-5)


def test_biases_are_in_the_file_and_turn_with_their_rows(
    tiny: Build, source: Path, ids: Tensor, tmp_path: Path
) -> None:
    model = tiny("llama", added=".")
    model.export(source, tmp_path, "gguf")
    torch.testing.assert_close(
        run(quantry.load(tmp_path, dtype=torch.float32), ids), model.logits(ids), atol=1e-5, rtol=1e-5
    )
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model-Q4_0.gguf").tensors}
    layer = model.layers["model.layers.1.self_attn.q_proj"]
    half, head = 8, 16  # llama.cpp rotates neighbours: row 2i of a head is our row i, row 2i + 1 our i + half
    order = [h * head + (i % 2) * half + i // 2 for h in range(4) for i in range(head)]
    bias, weight = tensors["blk.1.attn_q.bias"], tensors["blk.1.attn_q.weight"]
    np.testing.assert_array_equal(bias.data, layer.bias.numpy()[order])
    dense = dequantize(weight.data, weight.tensor_type)
    np.testing.assert_array_equal(dense, layer.weight.dequantize().numpy()[order])
    down = tensors["blk.0.ffn_down.weight"]
    expected = model.layers["model.layers.0.mlp.down_proj"].weight.dequantize().numpy()
    np.testing.assert_array_equal(dequantize(down.data, down.tensor_type), expected)


def test_the_tokenizer_survives(tiny: Build, source: Path, tmp_path: Path) -> None:
    tiny("llama").export(source, tmp_path, "gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model-Q4_0.gguf")
    original = AutoTokenizer.from_pretrained(source)
    for text in TEXT[:3]:
        assert theirs(text)["input_ids"] == original(text)["input_ids"]
    fields = GGUFReader(tmp_path / "model-Q4_0.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    tokens, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    assert len(tokens) == len(types) == 67
    assert (tokens[0], types[0]) == ("<s>", 3)
    assert types[-1] == 5  # rows of the embedding that no token uses


def test_llama3_rotary_scaling_is_written_as_factors(
    tiny: Build, source: Path, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = __import__("sys").modules[type(tiny("opt")).__module__]
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    monkeypatch.setitem(module.CONFIGS, "llama", {**module.CONFIGS["llama"], "rope_parameters": rope})
    model = tiny("llama")
    model.export(source, tmp_path, "gguf")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "model-Q4_0.gguf").tensors}
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    scaled = model.model.model.rotary_emb.inv_freq.numpy()  # transformers' own
    np.testing.assert_allclose(plain / tensors["rope_freqs.weight"], scaled, rtol=1e-6)
    torch.testing.assert_close(
        run(quantry.load(tmp_path, dtype=torch.float32), ids), model.logits(ids), atol=1e-5, rtol=1e-5
    )


def test_what_gguf_cannot_hold_is_refused(tiny: Build, source: Path, tmp_path: Path) -> None:
    cases = {
        "symmetric weights of 4 or 8 bits": tiny("llama", bits=3),
        "in groups of 32": tiny("llama", group_size=None),
        "not qwen2": tiny("qwen2"),
        "float16": tiny("llama", scale_dtype=torch.float32),
    }
    for words, model in cases.items():
        with pytest.raises(ExportError, match=words):
            model.export(source, tmp_path / "out", "gguf")
        assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(ExportError, match=r"no tokenizer\.json"):
        tiny("llama").export(tmp_path / "empty", tmp_path / "out", "gguf")


def test_a_splitting_rule_without_a_name_is_refused(tiny: Build, source: Path, tmp_path: Path) -> None:
    content = json.loads((source / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ExportError, match=r"Whitespace.*no name for"):
        tiny("llama").export(other, tmp_path / "out", "gguf")
