"""Softmax bias correction: the identities I1 to I9 of its specification, on tensors and on whole networks."""

from __future__ import annotations

import math
from pathlib import Path

import factories
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, SwinConfig, ViTConfig
from transformers.models.swin.modeling_swin import SwinForImageClassification
from transformers.models.vit.modeling_vit import ViTForImageClassification

from quantry.layers.operands import (
    CLOSED,
    attach,
    attached,
    set_probability_bias,
    use_quantized_attention,
    watch_probabilities,
)
from quantry.quantizers.activation import UniformQuantizer
from quantry.recipe import SoftmaxBiasStep
from worker.errors import CalibrationError, NonFiniteError
from worker.methods.softmax_bias import SoftmaxStatistics, correct_softmax, unit_grid
from worker.models.calls import BlockCall, run_block
from worker.models.causal_lm import CausalLM

DRAWS = torch.Generator().manual_seed(5)


def maps(
    tokens: int = 96, *, causal: bool, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor | None]:
    """Attention maps (2, 3, tokens, tokens) whose heads are of different sharpness, and their mask."""
    scores = torch.randn(2, 3, tokens, tokens, generator=DRAWS, dtype=torch.float64)
    scores = scores * torch.tensor([0.5, 1.5, 3.0]).view(3, 1, 1)
    mask = torch.ones(tokens, tokens, dtype=torch.float64).tril() if causal else None
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -math.inf)
    return scores.softmax(-1).to(dtype), None if mask is None else mask.to(dtype)[None, None]


def values(p: Tensor) -> Tensor:
    return torch.randn(*p.shape[:2], p.shape[3], 8, generator=DRAWS, dtype=torch.float64).to(p.dtype) + 0.5


def corrected(p: Tensor, mask: Tensor | None, quantizer: nn.Module, bias: Tensor) -> Tensor:
    """Equation 3."""
    valid = torch.ones_like(p) if mask is None else mask.expand(p.shape)
    return (quantizer(p) + bias.double()) * valid


@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_rows_sum_to_one_and_the_error_drops_by_the_square(bits: int, causal: bool, granularity: str) -> None:
    p, mask = maps(causal=causal)
    quantizer = unit_grid(bits)
    statistics = SoftmaxStatistics(quantizer)
    statistics.update(p, mask, v := values(p))
    bias = statistics.bias(granularity)

    after = corrected(p, mask, quantizer, bias)
    valid = torch.ones_like(p) if mask is None else mask.expand(p.shape)
    groups = (0, 1, 2) if granularity == "tensor" else (0, 2)
    sums = after.sum(-1).mean(groups)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-6, rtol=0)  # I1
    before = quantizer(p) * valid
    axes = (0, 1, 2, 3) if granularity == "tensor" else (0, 2, 3)
    drop = ((p - before).square() - (p - after).square()).sum(axes) / valid.sum(axes)
    torch.testing.assert_close(drop, bias.double().flatten().squeeze().square(), atol=0, rtol=1e-5)  # I2

    reports = statistics.error(None), statistics.error(bias)
    for found, wanted in zip(reports, (before, after), strict=True):
        assert found.row_sum == pytest.approx(float(wanted.sum(-1).mean()))
        assert found.mse == pytest.approx(float((p - wanted).square().sum() / valid.sum()))
        noise = ((p - wanted) @ v).square().sum()
        assert found.sqnr_db == pytest.approx(float(10 * ((p @ v).square().sum() / noise).log10()))


def test_the_offset_of_the_grid_holds_the_correction() -> None:
    """I3: equations 3, 4 and 5 are the same numbers."""
    p, _ = maps(causal=False)
    v = values(p)
    quantizer = unit_grid(8)
    statistics = SoftmaxStatistics(quantizer)
    statistics.update(p, None, v)
    bias = statistics.bias("head").double()
    scale = quantizer.scale.double()
    codes = (quantizer(p) / scale).round()
    offset = -bias / scale  # z', a real number
    direct = corrected(p, None, quantizer, bias)
    torch.testing.assert_close(scale * (codes - offset), direct)
    product = scale * (codes @ v) - scale * offset * v.sum(2, keepdim=True)
    torch.testing.assert_close(product, direct @ v)


def test_nothing_is_left_to_correct_at_16_bits() -> None:
    p, _ = maps(causal=False)  # I4
    statistics = SoftmaxStatistics(UniformQuantizer(16, []).fill(scale=torch.tensor(1 / 65535)))
    statistics.update(p, None, values(p))
    assert float(statistics.bias("head").abs().max()) < 0.02 / 65535  # of a step


def test_a_uniform_softmax_comes_back_whole() -> None:
    """I5: 1/N below half a step quantizes to 0, and beta is 1/N."""
    p = torch.full((1, 2, 4, 1024), 1 / 1024)
    statistics = SoftmaxStatistics(unit_grid(8))
    statistics.update(p, None, torch.ones(1, 2, 1024, 4))
    assert unit_grid(8)(p).abs().max() == 0
    bias = statistics.bias("tensor")
    assert float(bias) == 1 / 1024
    assert statistics.error(None).row_sum == 0
    assert statistics.error(bias).row_sum == 1
    assert statistics.error(bias).mse == 0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_bias_for_each_head_is_never_worse(bits: int) -> None:
    p, mask = maps(causal=True)  # I7
    statistics = SoftmaxStatistics(unit_grid(bits))
    statistics.update(p, mask, values(p))
    none, tensor, head = (statistics.error(b) for b in (None, *map(statistics.bias, ("tensor", "head"))))
    assert head.mse <= tensor.mse <= none.mse


def test_batches_of_any_size_give_the_same_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """I8, and chunks of rows as well."""
    pieces = [(*maps(tokens, causal=True, dtype=torch.float32),) for tokens in (7, 30, 64)]
    grid = unit_grid(6)
    whole, split = SoftmaxStatistics(grid), SoftmaxStatistics(grid)
    for p, mask in pieces:
        whole.update(p, mask, values(p))
    monkeypatch.setattr("worker.methods.softmax_bias.CHUNK", 500)
    for p, mask in reversed(pieces):
        for one in p:
            split.update(one[None], mask, values(p)[:1])
    torch.testing.assert_close(whole.bias("head"), split.bias("head"), atol=0, rtol=1e-6)


def test_neither_values_nor_the_order_of_keys_matter() -> None:
    p, _ = maps(causal=False)  # I9
    order = torch.randperm(p.shape[-1], generator=DRAWS)
    found = []
    for seen in (p, p[..., order]):
        statistics = SoftmaxStatistics(unit_grid(8))
        statistics.update(seen, None, values(p))
        found.append(statistics.bias("head"))
    torch.testing.assert_close(found[0], found[1])


def test_rows_without_a_key_do_not_count() -> None:
    p, mask = maps(causal=True)
    assert mask is not None
    whole, padded = SoftmaxStatistics(unit_grid(6)), SoftmaxStatistics(unit_grid(6))
    whole.update(p, mask, values(p))
    padded.update(p, mask, values(p))
    padded.update(torch.full_like(p, 1 / p.shape[-1]), torch.zeros_like(mask), values(p))
    torch.testing.assert_close(whole.bias("head"), padded.bias("head"), atol=0, rtol=0)


def test_what_cannot_be_used_is_refused() -> None:
    statistics = SoftmaxStatistics(unit_grid(8))
    with pytest.raises(CalibrationError, match="no attention row"):
        statistics.bias("head")
    with pytest.raises(NonFiniteError, match="probabilities are NaN"):
        statistics.update(torch.full((1, 1, 2, 2), torch.nan), None, torch.ones(1, 1, 2, 4))


# Networks.


def language_model(name: str, folder: Path) -> tuple[CausalLM, Tensor]:
    """A tiny model that attends through `quantry`, and windows (3, 40) of tokens."""
    model = CausalLM(
        factories.write_checkpoint(folder, name), device=torch.device("cpu"), dtype=torch.float32
    )
    use_quantized_attention(model.model)
    return model, torch.randint(4, 67, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("range_", ["unit", "max"])
@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("name", ["opt", "llama", "gemma2"])  # llama and gemma2: grouped queries
def test_a_block_is_corrected_and_left_as_it_was(
    name: str, granularity: str, range_: str, tmp_path: Path
) -> None:
    model, tokens = language_model(name, tmp_path)
    hidden, calls = model.embed(tokens)
    block = model.block(0)
    before = run_block(block, hidden, calls[0])
    step = SoftmaxBiasStep.model_validate({"bits": 4, "granularity": granularity, "range": range_})
    result = correct_softmax(block, "self_attn", [(hidden, calls[0])], step)
    assert list(attached(block)) == []
    assert not hasattr(block.get_submodule("self_attn"), "operands")
    torch.testing.assert_close(run_block(block, hidden, calls[0]), before, atol=0, rtol=0)
    heads = 4 if granularity == "head" else 1
    assert result.bias.shape == (heads, 1, 1)
    assert result.after.row_sum == pytest.approx(1, abs=1e-6)
    assert result.after.mse <= result.before.mse
    assert isinstance(result.quantizer, UniformQuantizer)
    shape = [4, 1, 1] if (granularity, range_) == ("head", "max") else []
    assert result.quantizer.shape == shape

    attach(block, "self_attn.probabilities", result.quantizer)
    set_probability_bias(block, "self_attn", result.bias)
    again = correct_softmax(block, "self_attn", [(hidden, calls[0])], step, result.quantizer)
    torch.testing.assert_close(again.bias, result.bias)  # it looks at P itself, not at what is attached


@pytest.mark.parametrize("name", ["opt", "llama", "gemma2"])
def test_later_tokens_never_reach_earlier_logits(name: str, tmp_path: Path) -> None:
    """I6: with quantizer and correction on every layer, masked keys stay at exactly 0."""
    model, tokens = language_model(name, tmp_path)
    network = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    use_quantized_attention(network)
    hidden, calls = model.embed(tokens)
    for index in range(len(model.blocks)):
        path = f"{model.family.blocks}.{index}.self_attn"
        result = correct_softmax(
            model.block(index), "self_attn", [(hidden, calls[index])], SoftmaxBiasStep(bits=3)
        )
        assert float(result.bias.min()) > 1e-4
        attach(network, f"{path}.probabilities", result.quantizer)
        set_probability_bias(network, path, result.bias)
        hidden = run_block(model.block(index), hidden, calls[index])
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 67
    with torch.no_grad():
        first, second = (network(input_ids=ids, use_cache=False).logits for ids in (tokens, changed))
    torch.testing.assert_close(first[:, :-1], second[:, :-1], atol=0, rtol=0)
    assert float((first[:, -1] - second[:, -1]).abs().max()) > 1e-3


def test_a_classifier_is_corrected() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=2,
    )
    network = ViTForImageClassification(config).eval().requires_grad_(False)
    use_quantized_attention(network)
    tokens = torch.randn(2, 257, 32)
    result = correct_softmax(
        network.vit.layers[0], "attention", [(tokens, BlockCall((), {}))], SoftmaxBiasStep(bits=6)
    )
    assert result.before.row_sum < 0.5  # 257 keys of 1/257 on a grid of 1/63
    assert result.after.row_sum == pytest.approx(1, abs=1e-6)
    assert result.after.sqnr_db > result.before.sqnr_db + 10


def test_windows_that_swin_closes_stay_closed() -> None:
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4, num_labels=3
    )
    network = SwinForImageClassification(config).eval().requires_grad_(False)
    use_quantized_attention(network)
    block = network.swin.encoder.layers[0].blocks[
        1
    ]  # shifted windows: a mask of -100 beside the position bias
    block.attention.relative_position_bias.relative_position_bias_table.normal_(std=4)
    hidden, call = torch.randn(2, 64, 16), BlockCall(((8, 8),), {})
    seen: list[tuple[Tensor, Tensor | None]] = []

    def see(p: Tensor, valid: Tensor | None, value: Tensor) -> None:
        seen.append((p, valid))

    with watch_probabilities(block, "attention", see):
        run_block(block, hidden, call)
    p, valid = seen[0]
    assert valid is not None
    assert CLOSED > -100
    closed = valid.expand(p.shape) == 0
    assert 0 < float(closed.double().mean()) < 1
    assert float(p[closed].max()) < 1e-20
    result = correct_softmax(block, "attention", [(hidden, call)], SoftmaxBiasStep(bits=4))
    assert result.after.row_sum == pytest.approx(1, abs=1e-6)

    attach(block, "attention.probabilities", result.quantizer)
    set_probability_bias(block, "attention", result.bias)
    open_ = block.attention.operands.probabilities_of(p, valid)
    assert float(open_[closed].abs().max()) == 0
    torch.testing.assert_close(open_.sum(-1).mean((0, 2)), torch.ones(2), atol=1e-5, rtol=0)


def test_a_module_whose_attention_runs_elsewhere_is_refused(tmp_path: Path) -> None:
    model, tokens = language_model("llama", tmp_path)
    hidden, calls = model.embed(tokens)
    block = model.block(0)
    block.self_attn.config._attn_implementation = "eager"
    for range_ in ("unit", "max"):
        step = SoftmaxBiasStep.model_validate({"range": range_})
        with pytest.raises(CalibrationError, match=r"softmax|attention row"):
            correct_softmax(block, "self_attn", [(hidden, calls[0])], step)
