"""Sampled labels and squared gradients: closed forms at the logits, and independence of the batch."""

from __future__ import annotations

from pathlib import Path

import factories
import pytest
import torch
from torch import Tensor

from quantry.layers.operands import attached
from worker.calibration.fisher import fisher_diagonals, run_and_catch, sampled_labels
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


def test_the_fisher_of_the_logits_is_p_times_one_minus_p(model: VisionModel) -> None:
    logits, caught = run_and_catch(model.network, pictures(model), [], ["classifier"])
    labels = sampled_labels(logits.detach(), 4000, seed=0)
    (fisher,) = fisher_diagonals(logits, labels, [caught["classifier"]])
    p = logits.detach().softmax(-1)
    torch.testing.assert_close(fisher, p * (1 - p), atol=0.02, rtol=0)


def test_gradients_do_not_depend_on_the_batch_and_are_not_round_off(model: VisionModel) -> None:
    pixels, layer = pictures(model), "vit.layers.0.mlp.fc1"
    labels = sampled_labels(model.logits(pixels), 2, seed=0)

    def fisher(batch: int) -> Tensor:
        parts = []
        for part, y in zip(pixels.split(batch), labels.split(batch, 1), strict=True):
            logits, caught = run_and_catch(model.network, part, [], [layer])
            parts += fisher_diagonals(logits, y, [caught[layer]])
        return torch.cat(parts)

    whole = fisher(6)
    assert whole.norm() > 1e-6
    torch.testing.assert_close(fisher(1), whole, rtol=1e-3, atol=float(whole.mean()) * 1e-3)
    torch.testing.assert_close(fisher(4), whole, rtol=1e-3, atol=float(whole.mean()) * 1e-3)


def test_the_network_is_left_as_it_was(model: VisionModel) -> None:
    pixels = pictures(model)
    before = model.logits(pixels)
    operands = [operand.name for operand in model.operands]
    logits, caught = run_and_catch(model.network, pixels, operands, list(model.layer_names))
    assert set(caught) == {*operands, *model.layer_names}
    torch.testing.assert_close(logits.detach(), before)
    assert not list(attached(model.network))
    assert not any(module._forward_hooks for module in model.network.modules())
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert not model.network(pixels).logits.requires_grad
