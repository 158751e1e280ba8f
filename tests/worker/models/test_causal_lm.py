"""The adapter against stock transformers, on a tiny model of every family."""

import json
from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from worker.calibration.streams import Stream
from worker.errors import ModelError, NonFiniteError
from worker.models.causal_lm import CausalLM


def tokens(windows: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(4, 67, (windows, length), generator=torch.Generator().manual_seed(5))


def adapter(folder: Path) -> CausalLM:
    return CausalLM(folder, device=torch.device("cpu"), dtype=torch.float32)


@torch.no_grad()
def logits_block_by_block(model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    model.use_kept(as_stored=False)
    stream = Stream.embed(model, ids)
    for index in range(len(model.blocks)):
        stream.advance(model.block(index), index)
    return model.head(ids, stream.hidden)


@pytest.mark.parametrize("name", factories.ARCHITECTURES)
def test_blocks_one_at_a_time_compute_what_the_model_computes(name: str, tmp_path: Path) -> None:
    folder = factories.write_checkpoint(tmp_path, name)
    model = adapter(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = stock(input_ids=tokens(), use_cache=False).logits

    torch.testing.assert_close(logits_block_by_block(model, tokens()), expected, atol=1e-5, rtol=1e-4)

    assert expected.std() > 0.1  # the comparison means something
    assert not any("forward" in vars(block) for block in model.blocks)


@pytest.mark.parametrize("name", factories.ARCHITECTURES)
def test_weights_and_biases_are_those_of_the_layers(name: str, tmp_path: Path) -> None:
    model = adapter(factories.write_checkpoint(tmp_path, name))
    block = model.block(1)
    x = torch.randn(5, 1)
    for local in model.family.linears:
        full = f"{model.family.blocks}.1.{local}"
        weight, bias = model.weight(full), model.bias(full)
        assert weight.shape[1] == model.columns(full)
        x = torch.randn(5, model.columns(full))
        expected = block.get_submodule(local)(x)
        torch.testing.assert_close(
            x @ weight.T + (0 if bias is None else bias), expected, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("name", "prefix"), [("opt", "model."), ("gpt2", "transformer."), ("llama", "model.")]
)
def test_checkpoints_saved_without_the_head_load_too(name: str, prefix: str, tmp_path: Path) -> None:
    folder = factories.write_checkpoint(tmp_path, name, tie_word_embeddings=True)
    expected = logits_block_by_block(adapter(folder), tokens())
    saved = load_file(folder / "model.safetensors")
    save_file({k.removeprefix(prefix): v for k, v in saved.items()}, folder / "model.safetensors")

    assert torch.equal(logits_block_by_block(adapter(folder), tokens()), expected)


def test_embeddings_and_head_are_what_the_artifact_stores(tmp_path: Path) -> None:
    model = adapter(factories.write_checkpoint(tmp_path, "llama"))
    kept = dict(model.kept())
    assert kept["model.embed_tokens.weight"].dtype == torch.float16
    assert kept["model.norm.weight"].dtype == torch.float32
    assert not any("q_proj" in name for name in kept)
    stored = model.model.get_input_embeddings().weight
    assert torch.equal(stored, kept["model.embed_tokens.weight"].float())
    model.use_kept(as_stored=False)
    assert torch.equal(stored, model.tensors.load("model.embed_tokens.weight"))


def break_tensor(folder: Path, name: str, value: torch.Tensor | None) -> None:
    saved = load_file(folder / "model.safetensors")
    if value is None:
        del saved[name]
    else:
        saved[name] = value
    save_file(saved, folder / "model.safetensors")


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = factories.write_checkpoint(tmp_path, "llama")
    break_tensor(folder, name, torch.zeros(3, 32))
    with pytest.raises(ModelError, match=rf"`{name}` has shape \(3, 32\), the config says \(48, 32\)"):
        adapter(folder)
    break_tensor(folder, name, None)
    with pytest.raises(ModelError, match=rf"tensor `{name}` is missing"):
        adapter(folder)


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    folder = factories.write_checkpoint(tmp_path, "llama")
    break_tensor(folder, "model.layers.0.extra.weight", torch.zeros(3))
    with pytest.raises(ModelError, match=r"extra.weight` belongs to no layer"):
        adapter(folder)


def test_a_damaged_weight_is_found_when_its_block_is_read(tmp_path: Path) -> None:
    folder = factories.write_checkpoint(tmp_path, "llama")
    broken = torch.zeros(48, 32)
    broken[3, 4] = torch.nan
    break_tensor(folder, "model.layers.1.mlp.up_proj.weight", broken)
    model = adapter(folder)
    model.block(0)
    with pytest.raises(NonFiniteError, match=r"layers.1.mlp.up_proj.weight holds NaN"):
        model.block(1)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = factories.write_checkpoint(tmp_path, "llama")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        adapter(folder)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("hidden_act", "nonsense", "nonsense"),
        ("num_attention_heads", 5, "5"),
        ("num_key_value_heads", 0, "zero"),
        ("tie_word_embeddings", "no", "tie_word_embeddings.* 'no'"),
    ],
)
def test_a_config_that_transformers_cannot_use_is_refused(
    tmp_path: Path, key: str, value: object, reason: str
) -> None:
    folder = factories.write_checkpoint(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ModelError, match=rf"transformers cannot use config\.json: .*{reason}"):
        adapter(folder)


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    folder = factories.write_checkpoint(tmp_path, "llama")
    (folder / "tokenizer.json").write_text("garbage")
    with pytest.raises(ModelError, match=r"transformers cannot use the tokenizer: ."):
        adapter(folder).tokenizer()
