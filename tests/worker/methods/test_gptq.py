"""The invariants of methods/gptq.md, section 9, and of the refinement that follows the sweep."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from quantry.quantizers.affine import QuantizedWeight
from quantry.recipe import GptqStep, RtnStep
from worker.calibration.statistics import InputStatistics
from worker.errors import CalibrationError
from worker.methods.gptq import Columns, descend, factorize, gptq, shifted_target, sweep
from worker.methods.grids import Grid, minmax_grid
from worker.methods.rtn import by_group, rtn

CLASSIC = {"clip": "none", "target": "plain", "refinement": 0}


def statistics(x_q: Tensor, x_f: Tensor | None = None) -> InputStatistics:
    """Mean statistics of inputs (tokens, n), float inputs equal to the quantized ones unless given."""
    gathered = InputStatistics.zeros(
        x_q.shape[1], hessian=True, cross=True, positions=None, device=torch.device("cpu")
    )
    x_f = x_q if x_f is None else x_f
    gathered.update(x_q.unsqueeze(0), x_f.unsqueeze(0))
    return gathered.mean("layer")


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs whose columns are mixed, unequal in size and not centred."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) * torch.linspace(0.2, 3, columns)
    return x @ mix + 0.5 * torch.randn(columns, generator=generator)


def weights(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5


def objective(w: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    """tr((W - W^) H (W - W^)^T), in float64."""
    delta = (quantized.dequantize() - w).double()
    return float(((delta @ hessian.double()) * delta).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_diagonal_hessian_gives_round_to_nearest(
    bits: int, group_size: int | None, symmetric: bool
) -> None:
    w = weights(12, 48)
    diagonal = InputStatistics(
        torch.diag(torch.linspace(0.1, 2, 48)), None, torch.zeros(48), torch.zeros(48), 9
    )
    step = GptqStep.model_validate(
        {"bits": bits, "group_size": group_size, "symmetric": symmetric, **CLASSIC}
    )

    swept = gptq(w, diagonal, step).weight

    nearest = rtn(w, RtnStep.model_validate({"bits": bits, "group_size": group_size, "symmetric": symmetric}))
    assert torch.equal(swept.codes, nearest.codes)
    assert torch.equal(swept.scale, nearest.scale)


def in_float64(grid: Grid, count: int) -> Columns:
    """One scale a row, for `count` columns."""
    columns = Columns.of(grid, None, count)
    return Columns(columns.scale.double(), columns.low.double(), columns.high.double(), columns.group_of)


def test_the_error_identity_holds() -> None:
    """sum (w_i - q_i)^2 / U_ii^2 over columns and rows = tr((W - W^)(H + lambda I)(W - W^)^T): equation 4."""
    torch.manual_seed(0)
    x = correlated(400, 40)
    factor = factorize((x.T @ x / 400).double(), damping=0.01, act_order=False)
    w = weights(10, 40).double()
    grid = minmax_grid(by_group(w, None), 3, symmetric=False)
    columns = in_float64(grid, 40)
    met: list[Tensor] = []  # every column as it was just before it was rounded
    left = w.T.clone()
    for i in range(40):
        met.append(left[i].clone())
        q = (left[i] / columns.scale[0]).round().clamp(columns.low[0], columns.high[0])
        error = (left[i] - q * columns.scale[0]) / factor.inverse_root[i, i]
        left -= torch.outer(factor.inverse_root[i], error)

    values = sweep(w.T.clone(), factor.inverse_root, columns) * columns.scale

    compensated = torch.stack(met)
    own = ((compensated - values) / factor.inverse_root.diagonal().unsqueeze(1)).square().sum()
    delta = values.T - w
    torch.testing.assert_close(own, ((delta @ factor.hessian) * delta).sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("leaf", [1, 3, 16, 64])
@pytest.mark.parametrize("columns", [1, 7, 33, 64])
def test_the_result_does_not_depend_on_the_block_size(leaf: int, columns: int) -> None:
    x = correlated(300, columns).double()
    factor = factorize(x.T @ x / 300, damping=0.01, act_order=True)
    w = weights(9, columns).double()
    grid = minmax_grid(by_group(w, None), 4, symmetric=True)
    place = in_float64(grid, columns)
    reference = sweep(w.T.clone(), factor.inverse_root, place, leaf=columns)
    assert torch.equal(sweep(w.T.clone(), factor.inverse_root, place, leaf=leaf), reference)


@pytest.mark.parametrize("scale", [2.0**-20, 0.5, 2.0**12])
def test_scaling_the_hessian_changes_nothing(scale: float) -> None:
    x, w = correlated(256, 32), weights(8, 32)
    one = statistics(x)
    other = InputStatistics(one.hessian * scale, one.cross * scale, one.sum_q, one.sum_f, one.tokens)
    step = GptqStep(bits=3)
    assert torch.equal(gptq(w, one, step).weight.codes, gptq(w, other, step).weight.codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_beats_rounding_and_refinement_beats_gptq(
    bits: int, group_size: int | None, symmetric: bool
) -> None:
    x, w = correlated(600, 64), weights(48, 64)
    seen = statistics(x)
    grid = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    nearest = objective(w, rtn(w, RtnStep.model_validate(grid)), seen.hessian)
    classic = objective(w, gptq(w, seen, GptqStep.model_validate({**grid, **CLASSIC})).weight, seen.hessian)
    clipped = {**grid, "target": "plain"}
    swept = gptq(w, seen, GptqStep.model_validate({**clipped, "refinement": 0})).weight
    refined = gptq(w, seen, GptqStep.model_validate({**clipped, "refinement": 3})).weight
    assert classic < nearest
    assert objective(w, refined, seen.hessian) < objective(w, swept, seen.hessian) < nearest


def test_refinement_never_raises_the_objective() -> None:
    """Every pass of `descend`, on the damped Hessian that it minimises, for grouped and whole rows."""
    for group_size in (None, 8):
        x, w = correlated(300, 48, seed=3), weights(20, 48, seed=4)
        factor = factorize(statistics(x).hessian, damping=0.01, act_order=True)
        grid = minmax_grid(by_group(w, group_size), 3, symmetric=True)
        columns = Columns.of(grid, group_size, 48)
        points = (w.T / columns.scale[columns.group_of]).round().clamp(-4, 3)
        errors = []
        for _ in range(5):
            delta = points * columns.scale[columns.group_of] - w.T
            errors.append(float(((factor.hessian @ delta) * delta).sum()))
            columns = descend(w.T.contiguous(), points, factor.hessian, columns)
        assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(errors))
        assert errors[-1] < 0.8 * errors[0]


def test_many_bits_keep_the_weight() -> None:
    x, w = correlated(256, 32), weights(8, 32)
    kept = gptq(w, statistics(x), GptqStep(bits=8, target="plain")).weight.dequantize()
    torch.testing.assert_close(kept, w, atol=3 * float(w.abs().max()) / 127, rtol=0)


def test_act_order_of_an_ordered_hessian_is_no_act_order() -> None:
    x = correlated(500, 24)
    seen = statistics(x[:, x.square().sum(0).argsort(descending=True)])
    assert torch.equal(seen.hessian.diagonal().sort(descending=True).values, seen.hessian.diagonal())
    one, other = (
        gptq(weights(6, 24), seen, GptqStep(bits=3, act_order=o)).weight for o in ("static", "none")
    )
    assert torch.equal(one.codes, other.codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_weight_lies_on_its_grid(bits: int) -> None:
    found = gptq(weights(8, 32), statistics(correlated(256, 32)), GptqStep(bits=bits, group_size=16)).weight
    assert found.codes.dtype == torch.uint8
    assert int(found.codes.max()) <= 2**bits - 1
    assert torch.isfinite(found.scale).all()
    assert (found.scale != 0).all()
    for group in found.dequantize().view(8, 2, 16).flatten(0, 1):
        assert len(group.unique()) <= 2**bits


def test_equal_inputs_or_no_strength_leave_the_target_alone() -> None:
    x, w = correlated(256, 32), weights(8, 32)
    plain = gptq(w, statistics(x), GptqStep(bits=3, target="plain")).weight.codes
    assert torch.equal(gptq(w, statistics(x), GptqStep(bits=3)).weight.codes, plain)
    other = statistics(x, x + 0.3 * correlated(256, 32, seed=5))
    assert torch.equal(gptq(w, other, GptqStep(bits=3, target_strength=0)).weight.codes, plain)
    assert not torch.equal(gptq(w, other, GptqStep(bits=3)).weight.codes, plain)


@pytest.mark.parametrize("rows", [8, 96])  # fewer and more than the columns: two orders of the products
def test_the_asymmetric_target_is_exact(rows: int) -> None:
    """|W^ X_q - W X_f|^2 = |(W^ - W*) X_q|^2 + const for every W^ (equation 7), with no damping."""
    x_q = correlated(500, 24).double()
    x_f = x_q + 0.2 * correlated(500, 24, seed=7).double()
    w = weights(rows, 24).double()
    hessian, cross = x_q.T @ x_q / 500, (x_f - x_q).T @ x_q / 500
    factor = factorize(hessian, damping=1e-13, act_order=True)
    mean = torch.zeros(24)
    inputs = InputStatistics(hessian, cross, mean, mean, 500)
    outputs = InputStatistics(hessian, None, mean, mean, 500, outputs=(x_f @ w.T).T @ x_q / 500)
    for seen in (inputs, outputs):
        target = shifted_target(w, seen, factor, 1.0)
        gaps = []
        for seed in range(3):
            guess = w + 0.1 * weights(rows, 24, seed=seed).double()
            wanted = (x_q @ guess.T - x_f @ w.T).square().sum()
            gaps.append(wanted - (x_q @ (guess - target).T).square().sum())
        torch.testing.assert_close(gaps[0], gaps[1], rtol=1e-6, atol=0)
        torch.testing.assert_close(gaps[0], gaps[2], rtol=1e-6, atol=0)


def test_dead_inputs_are_rounded_and_harm_nobody() -> None:
    x = correlated(256, 32)
    x[:, [3, 17]] = 0
    found = gptq(weights(8, 32), statistics(x), GptqStep(bits=4)).weight
    assert torch.isfinite(found.dequantize()).all()


def test_too_few_tokens_climb_the_damping_ladder_or_say_so() -> None:
    x = correlated(4, 64)  # rank 4 of 64
    seen = statistics(x * 1e3)
    assert gptq(weights(8, 64), seen, GptqStep(bits=4)).damping >= 0.01
    broken = torch.diag(torch.linspace(1, -3, 16))
    with pytest.raises(CalibrationError, match="not positive definite even with damping"):
        factorize(broken, damping=0.001, act_order=False)


def test_stacked_layers_are_quantized_as_if_alone() -> None:
    seen = statistics(correlated(300, 32))
    first, second = weights(8, 32), weights(5, 32, seed=9)
    together = gptq(torch.cat([first, second]), seen, GptqStep(bits=3)).weight
    alone = gptq(second, seen, GptqStep(bits=3)).weight
    assert torch.equal(together.codes[8:], alone.codes)
    assert torch.equal(together.scale[8:], alone.scale)


def test_grid_parameters_survive_float16() -> None:
    w = weights(6, 32) * 1e-3
    grid: Grid = minmax_grid(by_group(w, 16), 4, symmetric=False)
    assert torch.equal(grid.scale.half().float(), grid.scale)
