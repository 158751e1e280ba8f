"""Streams of hidden states: how two of them are compared, and a buffer that a block reshapes."""

import pytest
import torch
from torch import nn

from worker.calibration.streams import Stream, difference
from worker.models.calls import BlockCall


def stream(hidden: torch.Tensor) -> Stream:
    return Stream(hidden, hidden.clone(), {2: [BlockCall((), {})]}, batch=2)


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 5)])  # tokens; a classifier's logits
def test_the_mean_error_is_over_everything_but_the_channels(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    reference, shift = torch.randn(shape), torch.tensor([3.0, -3.0, 0.0, 1.0, -1.0])
    relative, mean = difference(stream(reference + shift), stream(reference))
    assert mean == pytest.approx(float(shift.square().mean().sqrt()), rel=1e-6)
    expected = shift.square().mean() / reference.square().mean()
    assert relative == pytest.approx(float(expected), rel=1e-5)


def test_a_block_may_change_the_shape() -> None:
    hidden = torch.arange(24.0).view(4, 6)
    moved = stream(hidden)
    moved.advance(nn.Unflatten(1, (2, 3)), 0)
    assert torch.equal(moved.hidden, hidden.view(4, 2, 3))
