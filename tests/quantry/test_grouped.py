"""Grouped quantizers: assignment by image, invariances, and the integer products they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quantry.quantizers.activation import UniformQuantizer, from_description
from quantry.quantizers.affine import QuantizedWeight
from quantry.quantizers.grouped import (
    ChannelQuantizer,
    GroupedQuantizer,
    extent,
    integer_attention,
    integer_linear,
)

BITS = [2, 4, 6, 8]


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activations(images: int = 3, tokens: int = 11, channels: int = 24, seed: int = 0) -> Tensor:
    """Channels of very different widths and centres, which change from image to image."""
    g = draws(seed)
    width = torch.randn(images, 1, channels, generator=g).exp()
    centre = torch.randn(1, 1, channels, generator=g)
    return torch.randn(images, tokens, channels, generator=g) * width + centre


def over(x: Tensor, bits: int, groups: int = 5) -> GroupedQuantizer:
    """Bounds from x's own channels, one in so many; the first range does not hold 0."""
    low, high = (bound.flatten().sort().values for bound in extent(x, "channels"))
    picks = torch.linspace(0, len(low) - 1, groups).long()
    quantizer = GroupedQuantizer(bits, groups, "channels").fill(low=low[picks], high=high[picks])
    quantizer.low[0], quantizer.high[0] = 0.8, 2.0
    return quantizer


def widened(x: Tensor, bits: int) -> GroupedQuantizer:
    """As `over` deals channels out, on grids that reach twice as far."""
    plain = over(x, bits)
    wide = GroupedQuantizer(bits, plain.groups, "channels", widened=True)
    return wide.fill(low=plain.low, high=plain.high, grid_low=2 * plain.low, grid_high=2 * plain.high)


def weight(out: int, columns: int, bits: int, symmetric: bool) -> QuantizedWeight:
    codes = torch.randint(0, 2**bits, (out, columns), generator=draws(1), dtype=torch.uint8)
    scale = (torch.rand(out, 1, generator=draws(2)) * 0.05 + 0.01).half()
    zero = torch.full((out, 1), 2 ** (bits - 1)) if symmetric else torch.arange(out)[:, None] % 2**bits
    return QuantizedWeight(codes, scale, zero.to(torch.uint8), bits, None, symmetric)


@pytest.mark.parametrize("bits", BITS)
def test_one_group_is_one_grid_for_the_tensor(bits: int) -> None:
    x = activations()
    low, high = (bound.mean() for bound in extent(x, "channels"))
    grouped = GroupedQuantizer(bits, 1, "channels").fill(low=low[None], high=high[None])
    torch.testing.assert_close(grouped(x), UniformQuantizer.covering(low, high, bits)(x))


def test_a_channel_takes_the_nearest_bounds_and_keeps_them_for_all_its_tokens() -> None:
    x = torch.tensor([[[0.0, -1.0, 9.0], [1.0, 1.0, 0.0]]])
    quantizer = GroupedQuantizer(4, 3, "channels")
    quantizer.fill(low=torch.tensor([-1.0, 0.0, 0.1]), high=torch.tensor([1.0, 8.0, 1.0]))
    assert quantizer.assign(x).tolist() == [[[2, 0, 1]]]


def test_a_row_takes_the_bound_nearest_to_its_largest_probability() -> None:
    p = torch.tensor([[[[0.9, 0.1], [0.5, 0.5]], [[0.3, 0.2], [0.0, 1.0]]]])
    quantizer = GroupedQuantizer(8, 2, "rows").fill(high=torch.tensor([0.45, 1.0]))
    assert quantizer.assign(p).squeeze(-1).tolist() == [[[1, 0], [0, 1]]]
    assert float(quantizer(p)[0, 0, 1].max()) == pytest.approx(0.45)  # beyond its bound, a value is clipped


def test_permuting_channels_permutes_groups_and_changes_no_value() -> None:
    x = activations()
    quantizer = widened(x, 4)
    order = torch.randperm(x.shape[-1], generator=draws(3))
    assert torch.equal(quantizer.assign(x[..., order]), quantizer.assign(x)[..., order])
    assert torch.equal(quantizer(x[..., order]), quantizer(x)[..., order])


@pytest.mark.parametrize("axis", ["channels", "rows"])
def test_an_image_is_quantized_alike_in_any_company(axis: str) -> None:
    x = activations().relu().softmax(-1) if axis == "rows" else activations()
    quantizer = widened(x, 4) if axis == "channels" else GroupedQuantizer(4, 3, "rows")
    if axis == "rows":
        quantizer.fill(high=torch.tensor([0.1, 0.3, 0.9]))
    together = quantizer(x)
    alone = torch.cat([quantizer(x[i : i + 1]) for i in range(len(x))])
    assert torch.equal(together, alone)
    twice = quantizer.assign(torch.cat([x[:1], x[:1], x[1:2]]))
    assert torch.equal(twice[0], twice[1])


def test_images_are_grouped_each_by_its_own_ranges() -> None:
    x = activations(images=2)
    x[1] = x[0] * 7
    groups = over(x, 4).assign(x)
    assert not torch.equal(groups[0], groups[1])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("weight_bits", "symmetric"), [(4, True), (8, False)])
def test_integer_products_by_group_add_up_to_the_simulated_layer(
    bits: int, weight_bits: int, symmetric: bool
) -> None:
    x, bias = activations(), torch.randn(10, generator=draws(4))
    w = weight(10, x.shape[-1], weight_bits, symmetric)
    for quantizer in (over(x, bits), widened(x, bits)):
        simulated = nn.functional.linear(quantizer(x), w.dequantize(), bias)
        integer = integer_linear(x, quantizer, w, bias)
        assert float((integer - simulated).norm() / simulated.norm()) < 1e-5


@pytest.mark.parametrize("bits", BITS)
def test_integer_attention_scales_output_rows(bits: int) -> None:
    p = torch.randn(2, 3, 7, 7, generator=draws(5)).mul(3).softmax(-1)
    value = torch.randn(2, 3, 7, 4, generator=draws(6)) + 0.5
    rows = GroupedQuantizer(bits, 3, "rows", widened=True)
    rows.fill(high=torch.tensor([0.2, 0.5, 1.0]), grid_high=torch.tensor([0.3, 0.7, 1.0]))
    low, high = value.amin((0, 2, 3)), value.amax((0, 2, 3))
    values = UniformQuantizer.covering(low[:, None, None], high[:, None, None], bits)
    simulated = rows(p) @ values(value)
    integer = integer_attention(p, rows, value, values)
    assert float((integer - simulated).norm() / simulated.norm()) < 1e-5


@pytest.mark.parametrize("constant", [0.0, 3.7, -1e-4])
def test_a_group_of_constant_channels_gives_the_constant(constant: float) -> None:
    x = torch.full((2, 5, 4), constant)
    bound = torch.tensor([constant])
    quantizer = GroupedQuantizer(4, 1, "channels").fill(low=bound, high=bound)
    torch.testing.assert_close(quantizer(x), x)
    torch.testing.assert_close(ChannelQuantizer(4)(x), x)


@pytest.mark.parametrize("bits", BITS)
def test_zero_stays_zero_where_the_bounds_hold_it(bits: int) -> None:
    x = torch.cat([activations(), torch.zeros(3, 1, 24)], dim=1)
    quantizer = GroupedQuantizer(bits, 2, "channels")
    quantizer.fill(low=torch.tensor([-1.3, 0.0]), high=torch.tensor([0.4, 5.0]))
    assert not quantizer(x)[:, -1].any()


def test_a_grid_of_its_own_keeps_a_channel_within_a_step() -> None:
    x = activations()
    low, high = extent(x, "channels")
    step = (high.clamp(min=0) - low.clamp(max=0)) / 15
    error = (ChannelQuantizer(4)(x) - x).abs()
    assert bool((error <= 1.001 * step).all())  # half for the value, half at the ends for the zero-point


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_description_and_the_buffers_are_the_whole_quantizer(dtype: torch.dtype) -> None:
    x = activations().to(dtype)
    for quantizer in (over(x.float(), 6), widened(x.float(), 6)):
        copy = from_description(quantizer.describe())
        copy.load_state_dict(quantizer.state_dict())
        assert torch.equal(copy(x), quantizer(x))
        assert copy(x).dtype == dtype
        assert copy(x).shape == x.shape


def test_a_description_of_a_checkpoint_from_before_grids_were_widened_still_loads() -> None:
    x = activations()
    plain = over(x, 4)
    description = {key: value for key, value in plain.describe().items() if key != "widened"}
    copy = from_description(description)
    copy.load_state_dict(plain.state_dict())
    assert torch.equal(copy(x), plain(x))


def test_a_widened_grid_clips_nothing_that_its_bounds_would() -> None:
    x = torch.tensor([[[-1.0, 8.0], [3.0, 0.0]]])  # channels over [-1, 3] and [0, 8]
    plain = GroupedQuantizer(8, 2, "channels").fill(low=torch.tensor([-1.0, 0]), high=torch.tensor([2.0, 7]))
    wide = GroupedQuantizer(8, 2, "channels", widened=True).fill(
        low=plain.low, high=plain.high, grid_low=plain.low, grid_high=torch.tensor([3.0, 8])
    )
    assert torch.equal(wide.assign(x), plain.assign(x))
    assert plain(x).amax().item() == pytest.approx(7)
    torch.testing.assert_close(wide(x), x, atol=0.02, rtol=0)


def test_run_time_operations_are_ranges_and_distances() -> None:
    n, c, g = 197, 768, 8
    channels = GroupedQuantizer(4, g, "channels").operations((2, n, c))
    assert channels == 2 * 32 * (2 * n * c + 4 * c * g)
    rows = GroupedQuantizer(4, g, "rows").operations((1, 12, n, n))
    assert rows == 32 * 12 * (n * n + 2 * n * g)


def test_what_cannot_be_grouped_is_refused() -> None:
    quantizer = GroupedQuantizer(4, 2, "channels")
    with pytest.raises(ValueError, match="over tokens"):
        quantizer(torch.ones(3, 8))
    w = weight(4, 8, 4, True)
    by_group = QuantizedWeight(w.codes, w.scale.repeat(1, 2), w.zero_point.repeat(1, 2), 4, 4, True)
    with pytest.raises(ValueError, match="one weight scale a row, not 2"):
        integer_linear(torch.ones(1, 3, 8), quantizer, by_group)
