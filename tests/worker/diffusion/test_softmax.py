"""Attention through our processor, its probabilities quantized and corrected by groups of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor
from torch import Tensor

from quantry.layers.denoiser_attention import OperandAttention, attentions, use_operand_attention
from quantry.layers.operands import attach, watch_probabilities
from quantry.quantizers.steps import StepProbabilities
from quantry.recipe import SoftmaxBiasStep
from worker.diffusion.quantizers import StepNetwork
from worker.diffusion.softmax import correct_softmax
from worker.diffusion.steps import read_steps
from worker.diffusion.trajectory import Latents
from worker.errors import RecipeError

MakeUNet = Callable[..., Any]
STEPS = read_steps(DDIMScheduler(num_train_timesteps=100, clip_sample=False), 4)


def latents(count: int = 3) -> list[Latents]:
    generator = torch.Generator().manual_seed(0)
    return [Latents(index, torch.randn(count, 2, 8, 8, generator=generator)) for index in range(4)]


def test_our_attention_computes_what_the_stock_one_does(make_unet: MakeUNet) -> None:
    unet = make_unet()
    x = latents()[0].x
    before = unet(x, 7).sample
    use_operand_attention(unet)
    assert all(isinstance(module.processor, OperandAttention) for module in attentions(unet).values())
    torch.testing.assert_close(unet(x, 7).sample, before, rtol=1e-5, atol=1e-6)


def test_our_attention_takes_contexts_and_masks() -> None:
    torch.manual_seed(0)
    attention = Attention(8, cross_attention_dim=6, heads=2, dim_head=4).eval()
    x, context = torch.randn(3, 5, 8), torch.randn(3, 4, 6)
    mask = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, -10000], [0, 0, -10000, -10000]])[:, None]
    wanted = [attention(x, context), attention(x, context, mask)]
    attention.set_processor(OperandAttention())
    for found, expected in zip([attention(x, context), attention(x, context, mask)], wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_other_processors_are_refused(make_unet: MakeUNet) -> None:
    unet = make_unet()
    next(iter(attentions(unet).values())).processor = AttnAddedKVProcessor()
    with pytest.raises(ValueError, match="AttnAddedKVProcessor, which has no quantizers"):
        use_operand_attention(unet)


@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("grid", ["unit", "max"])
def test_rows_sum_to_one_again_in_every_group_of_steps(
    granularity: str, grid: str, make_unet: MakeUNet
) -> None:
    network = StepNetwork(make_unet(attention_head_dim=6), STEPS)
    step = SoftmaxBiasStep.model_validate({"bits": 4, "granularity": granularity, "range": grid})
    reports = correct_softmax(network, latents(), step, 2)
    assert all(report.row_sum_after == pytest.approx(1, abs=1e-5) for report in reports)
    if grid == "unit":  # where the grid fits, little is lost
        assert any(abs(1 - (report.row_sum_before or 1)) > 0.01 for report in reports)
    corrected = StepNetwork(network.unet, STEPS)
    first = next(iter(attentions(network.unet)))  # what it is fed is not yet changed by other corrections
    table = network.unet.get_submodule(first).operands.probabilities
    assert isinstance(table, StepProbabilities)
    assert table.scale.shape == (2, 2 if granularity == "head" else 1)
    for row in range(2):
        sums: list[Tensor] = []

        def see(p: Tensor, valid: Tensor | None, value: Tensor, sums: list[Tensor] = sums) -> None:
            sums.append(table(p).sum(-1).mean())

        with watch_probabilities(network.unet, first, see):
            for index, x, _ in latents():
                if index // 2 == row:
                    corrected(x, index)
        assert float(torch.stack(sums).mean()) == pytest.approx(1, abs=1e-5)


def test_long_uniform_rows_are_restored_exactly() -> None:
    p = torch.full((1, 2, 3, 1024), 1 / 1024)
    table = StepProbabilities(8, 1, 1, 2).fill(scale=torch.full((1, 2), 1 / 255), bias=torch.zeros(1, 2))
    assert not table(p).any()
    table.fill(bias=torch.full((1, 2), 1 / 1024))
    torch.testing.assert_close(table(p), p, rtol=0, atol=0)


def test_gradients_pass_a_quantized_softmax(make_unet: MakeUNet) -> None:
    unet = make_unet()
    use_operand_attention(unet)
    name = next(iter(attentions(unet)))
    table = StepProbabilities(8, 1, 4, 1).fill(scale=torch.full((1, 1), 1 / 255))
    attach(unet, f"{name}.probabilities", table)
    p = torch.rand(1, 3, 4, 5, requires_grad=True)
    table(p).sum().backward()
    assert torch.equal(p.grad, torch.ones_like(p))  # type: ignore[arg-type]


def test_a_network_without_attention_is_refused(make_unet: MakeUNet) -> None:
    blocks = {
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "add_attention": False,
    }
    network = StepNetwork(make_unet(**blocks), STEPS)
    with pytest.raises(RecipeError, match="no attention"):
        correct_softmax(network, latents(), SoftmaxBiasStep(), 2)
