"""The layers of a UNet: which run, in which order, and where their inputs were concatenated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from worker.diffusion.unet import image_shape, layers_of
from worker.errors import ModelError

MakeUNet = Callable[..., Any]
ODD: list[dict[str, Any]] = [
    {},
    {"layers_per_block": 3, "block_out_channels": (8, 20)},
    {
        "block_out_channels": (12, 8, 20),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    {"downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift"},
    {"mid_block_type": None, "sample_size": (8, 4)},
    {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
]


class Concatenations(TorchFunctionMode):
    """Records the channels of the halves of every concatenation along them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.cat and args[0][0].dim() == 4:
            self.seen.append((args[0][0].shape[1], args[0][1].shape[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", ODD)
def test_splits_are_where_the_network_concatenates(make_unet: MakeUNet, changes: dict[str, Any]) -> None:
    unet = make_unet(**changes)
    layers = layers_of(unet)
    with Concatenations() as cats:
        unet(torch.zeros(1, *image_shape(unet)), 0)
    assert [layer.split for layer in layers if layer.split and layer.name.endswith("conv1")] == cats.seen
    for layer in layers:
        if layer.split:
            module = unet.get_submodule(layer.name)
            assert module.in_channels == sum(layer.split)
            assert layer.block in layer.name


@pytest.mark.parametrize("changes", ODD)
def test_every_layer_is_found_once_in_running_order(make_unet: MakeUNet, changes: dict[str, Any]) -> None:
    unet = make_unet(**changes)
    layers = layers_of(unet)
    expected = {n for n, m in unet.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    names = [layer.name for layer in layers]
    assert set(names) == expected
    assert len(names) == len(expected)
    assert names[:3] == ["time_embedding.linear_1", "time_embedding.linear_2", "conv_in"]
    assert [layer.name for layer in layers if layer.role == "last"] == names[-1:] == ["conv_out"]
    assert not any(hook for module in unet.modules() for hook in module._forward_pre_hooks)


def test_time_layers_see_nothing_but_the_timestep(make_unet: MakeUNet) -> None:
    unet = make_unet()
    inputs: dict[str, list[torch.Tensor]] = {}
    for layer in layers_of(unet):
        seen = inputs.setdefault(layer.name, [])
        module = unet.get_submodule(layer.name)
        module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
    for seed in range(2):
        x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
        unet(x, 30)
    same = {name for name, seen in inputs.items() if torch.equal(*seen)}
    assert same == {layer.name for layer in layers_of(unet) if layer.role == "time"}


def test_other_networks_are_refused(make_unet: MakeUNet) -> None:
    for changes, message in (
        ({"num_class_embeds": 3}, "class-conditional"),
        ({"out_channels": 4}, "variance"),
        ({"sample_size": None}, "sample_size"),
    ):
        with pytest.raises(ModelError, match=message):
            layers_of(make_unet(**changes))
    with pytest.raises(ModelError, match="Linear"):
        layers_of(nn.Linear(2, 2))
