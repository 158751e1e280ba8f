"""RepQ-ViT: grids of channels folded into one, without a change of the float network; percentiles by error."""

from __future__ import annotations

from pathlib import Path

import factories
import pytest
import torch
from torch import Tensor, nn

from quantry.quantizers.activation import UniformQuantizer
from quantry.quantizers.logarithmic import LogQuantizer
from quantry.recipe import RepqStep, RtnStep
from worker.errors import NonFiniteError
from worker.methods import repq
from worker.methods.activations import Images, observe, quantized
from worker.methods.repq import Fold, calibrate, channel_grid, fold_plan, percentile_search, reparameterize
from worker.methods.repq_softmax import of_least_error
from worker.models.vision import VisionModel

PADDED = {"image_size": 20, "window_size": 4}  # 10x10 patches and windows of 4x4, then 5x5
CASES = [
    ("vit", {}),
    ("vit", {"qkv_bias": False}),
    ("deit", {}),
    ("dinov2", {}),
    ("swin", {}),
    ("swin", PADDED),
    ("swin", {"qkv_bias": False}),
]


def load(folder: Path, name: str, **changes: object) -> VisionModel:
    return VisionModel(factories.write_classifier(folder, name, **changes), device=torch.device("cpu"))


def images(model: VisionModel, count: int = 8) -> Images:
    pixels = torch.randn(count, *model.image_shape, generator=torch.Generator().manual_seed(1))
    return Images(pixels, 0, RtnStep(bits=4))


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_the_float_network_computes_what_it_did(
    name: str, changes: dict[str, object], tmp_path: Path
) -> None:
    model = load(tmp_path, name, **changes)
    fresh = torch.randn(5, *model.image_shape, generator=torch.Generator().manual_seed(2))
    before, parameters = model.logits(fresh), {n: p.clone() for n, p in model.network.named_parameters()}
    calibrate(model, images(model), RepqStep(bits=4))
    after = dict(model.network.named_parameters())
    assert after.keys() == parameters.keys()
    torch.testing.assert_close(model.logits(fresh), before, atol=1e-4, rtol=1e-4)
    changed = {n for n in after if not torch.allclose(after[n], parameters[n], rtol=1e-3)}
    assert any("norm" in n for n in changed)
    assert not any(n.startswith("classifier") or "o_proj" in n or "fc2" in n for n in changed)


def test_shifts_are_left_out_where_nothing_takes_them_back(tmp_path: Path) -> None:
    model = load(tmp_path, "swin", **PADDED)
    shifts = {name: fold.shifts for name, fold in fold_plan(model, images(model).pixels).items()}
    assert len(shifts) == 7
    for name, shifted in shifts.items():
        assert shifted == name.endswith("fc1.input")
    plain = load(tmp_path / "plain", "swin")
    for name, fold in fold_plan(plain, images(plain).pixels).items():
        assert fold.shifts == ("reduction" not in name)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shifts", [True, False])
def test_one_grid_has_the_codes_that_the_channels_had(bits: int, shifts: bool) -> None:
    torch.manual_seed(0)
    norm, layer = nn.LayerNorm(12), nn.Linear(12, 5, bias=shifts)
    norm.weight.data, norm.bias.data = torch.rand(12) * 10 + 0.1, torch.randn(12) * 3
    x = torch.randn(300, 12) ** 3
    y = norm(x).detach()
    grid = channel_grid(y, bits, shifts=shifts)
    codes = (y / grid.scale + grid.zero_point).round().clamp(0, 2**bits - 1)
    expected = layer((codes - grid.zero_point) * grid.scale).detach()
    quantizer = reparameterize(Fold(norm, (layer,), shifts), grid, bits)
    assert quantizer.shape == []
    close = torch.isclose(layer(quantizer(norm(x))), expected, atol=1e-3, rtol=1e-3)
    assert close.float().mean() > 0.99  # the float network's own rounding flips a code at times


def test_a_constant_channel_stays_what_it_is() -> None:
    torch.manual_seed(0)
    norm, layer = nn.LayerNorm(6), nn.Linear(6, 3)
    norm.weight.data[:2], norm.bias.data[:2] = 0, torch.tensor([2.5, 0.0])
    x = torch.randn(100, 6)
    y, before = norm(x).detach(), layer(norm(x)).detach()
    quantizer = reparameterize(Fold(norm, (layer,), True), channel_grid(y, 8, shifts=True), 8)
    torch.testing.assert_close(layer(norm(x)), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer(quantizer(norm(x))), before, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_each_group_has_the_percentile_of_least_error(bits: int) -> None:
    x = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)) ** 5
    x[:, 1] = x[:, 1].abs()

    def error(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (UniformQuantizer(bits, []).fill(scale=scale, zero_point=zero)(x) - x).square().sum()

    scale, zero = percentile_search(x, bits, repq.with_zero)
    for group in range(4):
        values = x[:, group]
        errors = []
        for share in repq.PERCENTILES:
            low, high = values.quantile(1 - share).clamp(max=0), values.quantile(share).clamp(min=0)
            quantizer = UniformQuantizer.covering(low, high, bits)
            errors.append(error(values, quantizer.scale, quantizer.zero_point))
        torch.testing.assert_close(error(values, scale[group], zero[group]), min(errors))


def product_errors(model: VisionModel, pixels: Tensor, grids: dict[str, nn.Module]) -> dict[str, float]:
    """Squared error of P V by the operand P, with the float values; `pixels` are one batch."""
    places = [place for name in grids for place in (name, value_of(name))]
    seen: dict[str, Tensor] = {}
    observe(model, pixels, {place: lambda x, place=place: seen.update({place: x}) for place in places})
    return {
        name: float(((grid(seen[name]) - seen[name]) @ seen[value_of(name)]).square().sum())
        for name, grid in grids.items()
    }


def value_of(probabilities: str) -> str:
    return f"{probabilities.removesuffix('probabilities')}value"


@pytest.mark.parametrize("name", ["vit", "swin"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_grid_of_probabilities_is_the_better_one_for_the_product(
    name: str, bits: int, tmp_path: Path
) -> None:
    pixels = images(load(tmp_path / "shape", name)).pixels
    errors, kinds = {}, {}
    for choice in ("log", "chosen"):
        model = load(tmp_path / choice, name)
        found = calibrate(model, images(model), RepqStep(bits=bits, softmax=choice)).quantizers
        grids = {n: q for n, q in found.items() if n.endswith("probabilities")}
        kinds[choice] = [type(grid) for grid in grids.values()]
        errors[choice] = product_errors(model, pixels, dict(grids))
    for operand, error in errors["chosen"].items():
        assert error <= errors["log"][operand] * (1 + 1e-5)
    assert set(kinds["log"]) == {LogQuantizer}
    if bits == 8:  # evenly spaced steps are then 1/255, those of powers still a third of a value
        assert set(kinds["chosen"]) == {UniformQuantizer}
        assert sum(errors["chosen"].values()) < 0.01 * sum(errors["log"].values())


def test_each_attention_is_given_its_own_grid(tmp_path: Path) -> None:
    model = load(tmp_path, "vit")
    names = [operand.name for operand in model.operands if operand.kind == "probabilities"]
    good = LogQuantizer(4, []), UniformQuantizer(8, []).fill(scale=torch.tensor(1 / 255))
    bad = (
        LogQuantizer(4, []).fill(scale=torch.tensor(1e-6)),
        UniformQuantizer(8, []).fill(scale=torch.tensor(9.0)),
    )
    grids = {name: (bad[0], good[1]) if i % 2 else (good[0], bad[1]) for i, name in enumerate(names)}
    found = of_least_error(model, images(model), grids)
    assert [found[name] is grids[name][i % 2] for i, name in enumerate(names)] == [True] * len(names)


@pytest.mark.parametrize("name", ["vit", "dinov2", "swin"])
def test_every_operand_but_the_images_gets_a_static_grid(name: str, tmp_path: Path) -> None:
    model = load(tmp_path, name)
    heard: list[tuple[int, int]] = []
    calibration = images(model)
    told = Images(calibration.pixels, 0, calibration.weights, lambda done, total: heard.append((done, total)))
    found = calibrate(model, told, RepqStep(bits=4, softmax_bits=8, softmax="log")).quantizers
    operands = {operand.name: operand for operand in model.operands if operand.kind != "image"}
    assert found.keys() == operands.keys()
    assert heard[-1] == (len(operands), len(operands))
    for operand in operands.values():
        quantizer = found[operand.name]
        if operand.kind == "probabilities":
            assert isinstance(quantizer, LogQuantizer)
            assert (quantizer.bits, float(quantizer.exponent), float(quantizer.shift)) == (8, 0.5, 0)
            continue
        assert isinstance(quantizer, UniformQuantizer)
        assert quantizer.bits == 4
        assert len(quantizer.shape) == (3 if operand.kind in ("query", "key", "value") else 0)
        assert ((quantizer.zero_point >= 0) & (quantizer.zero_point <= 15)).all()
        assert torch.equal(quantizer.zero_point, quantizer.zero_point.round())
    with quantized(model, found):
        assert torch.isfinite(model.logits(calibration.pixels)).all()


def test_the_same_seed_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repq, "SAMPLE", 500)  # so that rows are drawn
    results = []
    for _ in range(2):
        model = load(tmp_path, "vit")
        found = calibrate(model, images(model, 40), RepqStep(bits=4)).quantizers
        results.append({name: quantizer.state_dict() for name, quantizer in found.items()})
    first, second = results
    assert all(torch.equal(first[n][key], second[n][key]) for n in first for key in first[n])


def test_samples_are_rows_of_the_operand_and_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repq, "SAMPLE", 1000)
    model = load(tmp_path, "vit")
    for operand, sample in repq.sampled(model, images(model, 40), model.operands[1:]):
        assert sample.numel() <= 2 * 1000
        if operand.kind == "probabilities":
            torch.testing.assert_close(sample.sum(-1), torch.ones(len(sample)))
        if operand.kind == "query":
            assert sample.shape[1:] == (4, 8)


def test_infinite_activations_are_named(tmp_path: Path) -> None:
    model = load(tmp_path, "vit")
    model.network.vit.layers[1].mlp.fc1.bias[3] = torch.inf
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.fc2\.input"):
        calibrate(model, images(model), RepqStep(bits=4))
