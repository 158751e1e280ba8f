"""PTQ4ViT: the distance, the search, and whole networks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import factories
import pytest
import torch
from torch import Tensor

from quantry.layers.operands import attached
from quantry.quantizers.twin import TwinGelu, TwinSoftmax
from quantry.recipe import GptqStep, Ptq4vitStep, RtnStep
from worker.calibration.fisher import BackwardWalk
from worker.errors import CalibrationError, RecipeError
from worker.methods import ptq4vit
from worker.methods.activations import Images, quantized
from worker.methods.ptq4vit import blocks_of, by_image, calibrate
from worker.methods.ptq4vit_search import (
    CHANNELS,
    AttentionRows,
    LinearRows,
    nearest,
    screened,
    search_attention,
    search_linear,
)
from worker.methods.ptq4vit_spaces import (
    Space,
    softmax_space,
    uniform_space,
    unquantized,
    weight_space,
)
from worker.methods.rtn import rtn
from worker.models.vision import VisionModel

CPU = torch.device("cpu")
FAST = {"candidates": 12, "rounds": 2}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_rows() -> LinearRows:
    """Few enough that the screening sees all of them."""
    return LinearRows(noise(16, 10).exp() - 1, noise(16, 6, seed=1).square(), noise(6, 10, seed=2))


def input_space(rows: LinearRows, count: int = 20) -> Space:
    return uniform_space(rows.x.amin(), rows.x.amax(), 4, count)


def loss(rows: LinearRows, inputs: Space, p: Tensor, weights: Space, g: Tensor) -> Tensor:
    """Eq. 3, by output channel."""
    out = inputs.quantize_one(rows.x, p) @ weights.quantize_one(rows.w, g).T
    return (rows.fisher * (out - rows.x @ rows.w.T) ** 2).mean(0)


def test_a_search_chooses_as_brute_force_does() -> None:
    rows = linear_rows()
    inputs, weights = input_space(rows), weight_space(rows.w, RtnStep(bits=3), 20)
    given = partial(LinearRows.weight_distances, weights=weights, inputs=inputs, p=inputs.incumbent)
    g = nearest(given, rows, screened(given, rows, weights, CHANNELS), weights.incumbent)
    grids = [*weights.candidates, weights.incumbent]
    by_channel = torch.stack([loss(rows, inputs, inputs.incumbent, weights, grid) for grid in grids])
    best = torch.stack([grids[i][row] for row, i in enumerate(by_channel.argmin(0).tolist())])
    torch.testing.assert_close(g, best)


def test_neither_grid_can_be_bettered_alone_where_the_turns_end() -> None:
    rows = linear_rows()
    inputs, weights = input_space(rows), weight_space(rows.w, RtnStep(bits=3), 20)
    p, g = search_linear(rows, inputs, weights, 10)
    end = loss(rows, inputs, p, weights, g).mean()
    others = [loss(rows, inputs, other, weights, g).mean() for other in inputs.candidates]
    assert end <= min(others) * (1 + 1e-5)


def test_without_gradients_the_distance_is_the_squared_error() -> None:
    rows = replace(linear_rows(), fisher=torch.ones(16, 6))
    inputs = input_space(rows)
    distances = rows.input_distances(inputs.candidates, inputs, rows.w)
    for distance, p in zip(distances, inputs.candidates, strict=True):
        error = torch.nn.functional.mse_loss(inputs.quantize_one(rows.x, p) @ rows.w.T, rows.target)
        torch.testing.assert_close(distance, error.view(1))


def test_the_scale_of_the_gradients_does_not_matter() -> None:
    rows = linear_rows()
    inputs, weights = input_space(rows), weight_space(rows.w, RtnStep(bits=4), 20)
    once = search_linear(rows, inputs, weights, 3)
    again = search_linear(replace(rows, fisher=rows.fisher * 2.0**-20), inputs, weights, 3)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group_size", [None, 5])
def test_more_rounds_never_raise_the_distance(bits: int, group_size: int | None) -> None:
    rows = LinearRows(noise(700, 10).exp(), noise(700, 6, seed=1).square(), noise(6, 10, seed=2))
    step = RtnStep.model_construct(bits=bits, group_size=group_size, symmetric=False, clip="mse")
    inputs, weights = input_space(rows), weight_space(rows.w, step, 20)
    losses = [float(loss(rows, inputs, inputs.incumbent, weights, weights.incumbent).sum())]
    for rounds in (1, 2, 3, 5):
        p, g = search_linear(rows, inputs, weights, rounds)
        losses.append(float(loss(rows, inputs, p, weights, g).sum()))
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


def test_the_incumbent_of_a_weight_is_round_to_nearest() -> None:
    w, step = noise(6, 16), RtnStep(bits=4, clip="mse", group_size=8)
    space = weight_space(w, step, 5)
    torch.testing.assert_close(space.quantize_one(w, space.incumbent), rtn(w, step).dequantize())


def attention_rows(mask: Tensor | None = None) -> AttentionRows:
    q, k, v = (noise(3, 2, 7, 4, seed=seed) * 2 for seed in range(3))
    scores = q @ k.mT / 2
    p = (scores if mask is None else scores + mask).softmax(-1)
    return AttentionRows(q, k, v, p, noise(3, 2, 7, 4, seed=3).square())


def attention_spaces(rows: AttentionRows, bits: int) -> dict[str, Space]:
    def by_head(x: Tensor) -> Space:
        return uniform_space(x.amin((0, 2, 3))[:, None, None], x.amax((0, 2, 3))[:, None, None], bits, 20)

    spaces = {role: by_head(getattr(rows, role)) for role in ("query", "key", "value")}
    return {**spaces, "probabilities": softmax_space(bits, "nearest", CPU)}


@pytest.mark.parametrize("closed", [0.0, -100.0, -torch.inf])
def test_the_scores_of_quantized_queries_keep_their_mask(closed: float) -> None:
    mask = torch.zeros(7, 7).masked_fill(torch.ones(7, 7).triu(1).bool(), closed)
    rows = attention_rows(mask)
    spaces = attention_spaces(rows, 4)
    distances = rows.query_distances(
        spaces["query"].candidates, spaces["query"], unquantized(CPU), torch.empty(1, 0)
    )
    for distance, grid in zip(distances, spaces["query"].candidates, strict=True):
        q = spaces["query"].quantize_one(rows.query, grid)
        out = (q @ rows.key.mT / 2 + mask).softmax(-1) @ rows.value
        error = rows.fisher * (out - rows.probabilities @ rows.value) ** 2
        torch.testing.assert_close(distance, error.mean((0, 2, 3)), rtol=1e-3, atol=1e-5)


def test_heads_are_searched_apart_and_more_rounds_lower_the_distance() -> None:
    rows = attention_rows()
    spaces = attention_spaces(rows, 4)

    def score_loss(chosen: dict[str, Tensor]) -> Tensor:
        grid = chosen["query"].unsqueeze(0)
        return rows.query_distances(grid, spaces["query"], spaces["key"], chosen["key"])[0]

    start = {role: spaces[role].incumbent for role in ("query", "key")}
    losses = [score_loss(start)] + [score_loss(search_attention(rows, spaces, n)) for n in (1, 2, 3)]
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + 1e-5)).all()  # of each head
    one = AttentionRows(
        *(x[:, :1] for x in (rows.query, rows.key, rows.value, rows.probabilities, rows.fisher))
    )
    alone = search_attention(one, {**attention_spaces(one, 4)}, 3)
    both = search_attention(rows, spaces, 3)
    torch.testing.assert_close(alone["query"], both["query"][:1])
    torch.testing.assert_close(alone["key"], both["key"][:1])


# Whole networks.


def load(folder: Path, name: str = "vit", **changes: object) -> VisionModel:
    return VisionModel(factories.write_classifier(folder, name, **changes), device=CPU)


def images(model: VisionModel, count: int = 8, seed: int = 0, **changes: object) -> Images:
    weights = changes.get("weights", RtnStep(bits=4, clip="mse"))
    assert isinstance(weights, RtnStep | GptqStep)
    return Images(noise(count, *model.image_shape, seed=5), seed, weights)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "swin"])
def test_every_operand_and_weight_gets_a_grid(tmp_path: Path, name: str) -> None:
    model = load(tmp_path, name)
    before = model.logits(images(model).pixels)
    told: list[tuple[int, int]] = []
    heard = replace(images(model), tell=lambda done, total: told.append((done, total)))
    found = calibrate(model, heard, Ptq4vitStep(bits=4, softmax_bits=8, **FAST))
    kinds = {operand.name: operand.kind for operand in model.operands}
    assert set(found.quantizers) == {name for name, kind in kinds.items() if kind != "image"}
    assert set(found.weights) == set(model.layer_names)
    for operand, quantizer in found.quantizers.items():
        assert quantizer.bits == (8 if kinds[operand] == "probabilities" else 4)
        assert isinstance(quantizer, TwinSoftmax) == (kinds[operand] == "probabilities")
        assert isinstance(quantizer, TwinGelu) == (kinds[operand] == "post_activation")
    for layer, weight in found.weights.items():
        assert weight.dequantize().shape == model.weight(layer).shape
    assert told == [(i + 1, model.count) for i in range(model.count)]
    assert not list(attached(model.network))
    torch.testing.assert_close(model.logits(images(model).pixels), before)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_many_bits_leave_the_logits_as_they_are(tmp_path: Path, name: str) -> None:
    model = load(tmp_path, name)
    pixels = images(model).pixels
    before = model.logits(pixels)
    step = Ptq4vitStep.model_construct(bits=16, **FAST)
    found = calibrate(model, images(model, weights=GptqStep(bits=4)), step)
    assert not found.weights
    with quantized(model, found.quantizers):
        torch.testing.assert_close(model.logits(pixels), before, atol=0.02, rtol=0.01)


def test_the_seed_decides(tmp_path: Path) -> None:
    model = load(tmp_path)
    step = Ptq4vitStep(bits=4, **FAST)

    def state(seed: int) -> Iterator[Tensor]:
        for quantizer in calibrate(model, images(model, seed=seed), step).quantizers.values():
            yield from quantizer.buffers()

    once = list(state(1))
    assert all(torch.equal(a, b) for a, b in zip(once, state(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(once, state(2), strict=True))


def test_the_search_lowers_the_error_of_the_logits(tmp_path: Path) -> None:
    model = load(tmp_path)
    given = images(model, 16)
    before = model.logits(given.pixels)

    def error(step: Ptq4vitStep) -> float:
        with quantized(model, calibrate(model, given, step).quantizers):
            return float((model.logits(given.pixels) - before).square().mean())

    spaces = ptq4vit.operand_spaces(model, given.pixels, Ptq4vitStep(bits=4))
    with quantized(model, {name: space.build(space.incumbent) for name, space in spaces.items()}):
        unsearched = float((model.logits(given.pixels) - before).square().mean())
    assert error(Ptq4vitStep(bits=4)) < 0.9 * unsearched
    assert error(Ptq4vitStep(bits=4, metric="mse")) < 0.9 * unsearched


def test_every_image_weighs_the_same() -> None:
    fisher = noise(3, 4, 5).square() * torch.tensor([1.0, 1e-12, 0.0]).view(3, 1, 1)
    torch.testing.assert_close(by_image(fisher, 3).mean((1, 2)), torch.tensor([1.0, 1.0, 0.0]))
    windows = noise(6, 4, 5).square()  # two windows an image
    torch.testing.assert_close(by_image(windows, 3).view(3, -1).mean(1), torch.ones(3))
    torch.testing.assert_close(by_image(windows * 1e-9, 3), by_image(windows, 3))


def test_rows_beyond_the_limit_are_the_lightest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tmp_path)
    given, step = images(model, 40), Ptq4vitStep(bits=4)
    operands = blocks_of(model)[-2]

    def kept() -> dict[str, tuple[Tensor, ...]]:
        walk = BackwardWalk(model, given.pixels, draws=2, seed=0)
        ptq4vit.kept_rows(model, blocks_of(model)[-1], walk, given, step)
        return ptq4vit.kept_rows(model, operands, walk, given, step)

    whole = kept()
    monkeypatch.setattr(ptq4vit, "TOKENS", 50)
    monkeypatch.setattr(ptq4vit, "QUERIES", 80)
    few = kept()
    for operand in operands:
        if operand.name in whole:
            assert len(few[operand.name][0]) == 50
            torch.testing.assert_close(few[operand.name][0], whole[operand.name][0][:50])
        if operand.kind == "query":
            some = AttentionRows(*few[operand.layers[0]])
            assert some.query.shape[2] == some.probabilities.shape[2] == 2  # of each of 40 images
            assert some.key.shape[2] == some.probabilities.shape[3] > 2


def test_the_queries_that_are_kept_weigh_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptq4vit, "QUERIES", 6)
    rows = attention_rows()
    fisher = noise(3, 7, 8).square()  # (windows, tokens, heads * width)
    kept = ptq4vit._queries(
        rows.query, rows.key, rows.value, rows.probabilities, fisher, 3, lambda f: f.flatten(1).sum(1)
    )
    for window, heaviest in enumerate(fisher.sum(-1).topk(2).indices):
        torch.testing.assert_close(kept[0][window], rows.query[window][:, heaviest])
        torch.testing.assert_close(kept[3][window], rows.probabilities[window][:, heaviest])
        of_output = fisher[window, heaviest].view(2, 2, 4).transpose(0, 1)
        torch.testing.assert_close(kept[4][window], of_output)
    assert kept[1] is rows.key


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = load(tmp_path / "relu", hidden_act="relu")
    with pytest.raises(RecipeError, match="GELU"):
        calibrate(model, images(model), Ptq4vitStep(bits=4))
    certain = load(tmp_path / "certain")
    certain.network.classifier.bias.data[0] = 1e4
    with pytest.raises(CalibrationError, match="metric: mse"):
        calibrate(certain, images(certain), Ptq4vitStep(bits=4))
    calibrate(certain, images(certain), Ptq4vitStep(bits=4, metric="mse", **FAST))
