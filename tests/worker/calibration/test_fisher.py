"""Sampled labels and squared gradients: closed forms at the logits, and independence of the batch."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import factories
import pytest
import torch
from torch import Tensor, nn

from quantry.layers.operands import attached
from worker.calibration.fisher import BackwardWalk, sampled_labels
from worker.models.network import join
from worker.models.vision import VisionModel


@pytest.fixture
def model(tmp_path: Path) -> VisionModel:
    return VisionModel(factories.write_classifier(tmp_path, "vit"), device=torch.device("cpu"))


def pictures(model: VisionModel, count: int = 6) -> Tensor:
    return torch.randn(count, *model.image_shape, generator=torch.Generator().manual_seed(3))


def test_labels_are_drawn_from_the_prediction_and_repeat_with_the_seed() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, -50.0]])
    labels = sampled_labels(logits, 20_000, seed=1)
    assert labels.shape == (20_000, 2)
    shares = torch.stack([(labels == i).float().mean(0) for i in range(3)], -1)
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.015, rtol=0)
    assert torch.equal(labels, sampled_labels(logits, 20_000, seed=1))
    assert not torch.equal(labels, sampled_labels(logits, 20_000, seed=2))


def walked(model: VisionModel, pixels: Tensor, draws: int) -> dict[str, Tensor]:
    """F of every layer's output over all images, by layer, from the last block to the first."""
    walk = BackwardWalk(model, pixels, draws=draws, seed=0)
    found: dict[str, list[Tensor]] = {}
    for index in reversed(range(model.count)):
        layers = [join(model.prefix(index), name) for group in model.groups(index) for name in group]
        for seen in walk.visit([], layers, layers):
            for name, fisher in seen.fisher.items():
                found.setdefault(name, []).append(fisher)
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_the_fisher_of_the_logits_is_p_times_one_minus_p(model: VisionModel) -> None:
    pixels = pictures(model)
    p = model.logits(pixels).softmax(-1)
    fisher = walked(model, pixels, 4000)["classifier"]
    torch.testing.assert_close(fisher, p * (1 - p), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["vit", "dinov2", "swin"])
def test_a_walk_gives_the_squared_gradients_of_the_whole_network(tmp_path: Path, name: str) -> None:
    model = VisionModel(factories.write_classifier(tmp_path / name, name), device=torch.device("cpu"))
    pixels = pictures(model, 3)
    outputs: dict[str, Tensor] = {}

    def catch(module: nn.Module, inputs: object, out: Tensor, layer: str) -> None:
        outputs[layer] = out if out.requires_grad else out.requires_grad_()

    with torch.enable_grad(), ExitStack() as hooks:
        for layer in model.layer_names:
            module = model.network.get_submodule(layer)
            hooks.callback(module.register_forward_hook(partial(catch, layer=layer)).remove)
        logits = model.network(pixels).logits
    expected = dict.fromkeys(outputs, torch.zeros(()))
    for y in sampled_labels(logits.detach(), 3, seed=0):
        loss = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
        found = torch.autograd.grad(loss, list(outputs.values()), retain_graph=True)
        for layer, g in zip(outputs, found, strict=True):
            expected[layer] = expected[layer] + g.square() / 3
    fishers = walked(model, pixels, 3)
    assert set(fishers) == set(expected)
    for layer, fisher in fishers.items():
        torch.testing.assert_close(fisher, expected[layer], rtol=1e-3, atol=float(fisher.mean()) * 1e-3)


def test_gradients_do_not_depend_on_the_batch_and_are_not_round_off(model: VisionModel) -> None:
    pixels, layer = pictures(model), "vit.layers.0.mlp.fc1"
    whole = walked(model, pixels, 2)[layer]
    assert whole.norm() > 1e-6
    for batch in (1, 4):
        model.images_at_once = batch
        torch.testing.assert_close(
            walked(model, pixels, 2)[layer], whole, rtol=1e-3, atol=float(whole.mean()) * 1e-3
        )


def test_the_network_is_left_as_it_was(model: VisionModel) -> None:
    pixels = pictures(model)
    before = model.logits(pixels)
    walk = BackwardWalk(model, pixels, draws=1, seed=0)
    caught: set[str] = set()
    for index in reversed(range(model.count)):
        prefix = model.prefix(index)
        layers = [join(prefix, name) for group in model.groups(index) for name in group]
        operands = [o.name for o in model.operands if set(o.layers) & {*layers, f"{prefix}.attention"}]
        for seen in walk.visit(operands, layers, layers):
            caught |= set(seen.tensors)
            assert not any(tensor.requires_grad for tensor in seen.tensors.values())
    assert caught == {*(operand.name for operand in model.operands), *model.layer_names}
    torch.testing.assert_close(model.logits(pixels), before)
    assert not list(attached(model.network))
    assert not any(module._forward_hooks for module in model.network.modules())
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert not model.network(pixels).logits.requires_grad
