"""Layers and tensors from config.json alone, against the networks that transformers builds of it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import factories
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantry.base import SpecError
from quantry.convnets import CONV_FAMILIES, conv_family_of, tensor_shapes
from quantry.requests import JobRequest
from quantry.training_planning import plan_training

CASES: list[tuple[str, dict[str, Any], int]] = [
    ("resnet", {}, 64),  # ResNet-50
    ("resnet", {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}, 65),
    ("resnet", {"hidden_sizes": [32, 64], "depths": [1, 2], "num_labels": 3, "downsample_in_first_stage": True}, 64),
    ("resnet", {"hidden_sizes": [32, 64], "depths": [1, 2], "downsample_in_bottleneck": True}, 64),
    ("mobilenet_v2", {}, 64),
    ("mobilenet_v2", {"depth_multiplier": 0.35, "tf_padding": False, "output_stride": 8}, 97),
    ("mobilenet_v2", {"first_layer_is_expansion": False, "finegrained_output": False, "depth_multiplier": 0.5}, 63),
    ("cifar_resnet", {"num_labels": 10}, 32),  # ResNet-20
    ("cifar_resnet", {"depths": [1, 1], "widths": [8, 20], "num_channels": 1}, 28),
]  # fmt: skip


def config_of(name: str, changes: dict[str, Any], side: int) -> tuple[PretrainedConfig, dict[str, Any]]:
    config = CONFIG_MAPPING[name](**changes)
    return config, {**json.loads(config.to_json_string()), "image_size": side}


@pytest.mark.parametrize(("name", "changes", "side"), CASES)
def test_layers_and_tensors_are_those_of_the_network(name: str, changes: dict[str, Any], side: int) -> None:
    config, written = config_of(name, changes, side)
    with torch.device("meta"):
        network = AutoModelForImageClassification.from_config(config).eval()
    family = conv_family_of(written)
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert dict(tensor_shapes(family, written)) == expected
    outputs: dict[str, int] = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, i, o, path=path: outputs.__setitem__(path, o[0].numel()))
    network(pixel_values=torch.empty(1, config.num_channels, side, side, device="meta"))
    found = list(family.layers(written, (side, side)))
    assert {layer.name: layer.outputs for layer in found} == outputs
    depthwise = {path for path, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    assert {layer.name for layer in found if layer.reason and "depthwise" in layer.reason} == depthwise


def test_resnet_20_has_its_layers_and_parameters() -> None:
    _, config = config_of("cifar_resnet", {"num_labels": 10}, 32)
    layers = list(CONV_FAMILIES["cifar_resnet"].layers(config, (32, 32)))
    assert len(layers) == 20
    assert [layer.name for layer in layers if layer.reason] == ["resnet.embedder.convolution", "classifier"]
    assert sum(layer.outputs for layer in layers) == 10 + 32 * 32 * 16 * 7 + 16 * 16 * 32 * 6 + 8 * 8 * 64 * 6


@pytest.mark.parametrize("name", [*factories.CONVNETS, *factories.CLASSIFIERS])
def test_every_family_is_planned_without_its_weights(name: str) -> None:
    known = {**factories.CONVNETS, **factories.CLASSIFIERS}[name]
    config = {
        **json.loads(
            CONFIG_MAPPING[name](**{k: v for k, v in known.items() if v is not None}).to_json_string()
        )
    }
    step = {"method": "fixed_point_training", "bits": 4, "init": "random"}
    images = {"dataset": {"source": "local", "id": "images.npz"}}
    spec = JobRequest(model="local:x", recipe=[step], calibration=images, evaluation=images).resolve()  # type: ignore[arg-type]
    plan = plan_training(spec, config, {})
    with torch.device("meta"):
        network = AutoModelForImageClassification.from_config(
            CONFIG_MAPPING[name](**{**config, "architectures": [plan.architecture]})
        )
    modules = dict(network.named_modules())
    for layer in plan.layers:
        assert tuple(modules[layer.name].weight.shape) == layer.shape
    assert plan.quantized
    assert {"classifier", "classifier.1"} & {layer.name for layer in plan.layers if layer.reason}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("resnet", {"depths": [1, 2, 3]}),
        ("resnet", {"hidden_sizes": "many"}),
        ("resnet", {"layer_type": "wide"}),
        ("mobilenet_v2", {"depth_multiplier": -1}),
        ("mobilenet_v2", {"expand_ratio": "six"}),
        ("mobilenet_v2", {"expand_ratio": -1}),
        ("mobilenet_v2", {"min_depth": None}),
        ("resnet", {"architectures": 5}),
        ("cifar_resnet", {"num_labels": 0}),
        ("cifar_resnet", {"widths": []}),
        ("cifar_resnet", {"auto_map": {"AutoModel": "code.py"}}),
        ("cifar_resnet", {"architectures": ["CifarResNetModel"]}),
    ],
)
def test_odd_configs_are_refused(name: str, changes: dict[str, Any]) -> None:
    _, config = config_of(name, {}, 32)
    with pytest.raises(SpecError, match="model"):
        list(tensor_shapes(conv_family_of({**config, **changes}), {**config, **changes}))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cifar_resnet", {"depths": [2**31 - 1, 1, 1]}),
        ("resnet", {"depths": [1, 10**9, 1, 1]}),
        ("vit", {"num_hidden_layers": 10**9}),
        ("swin", {"window_size": 9}),
    ],
)
def test_networks_that_nobody_can_run_are_refused_at_once(name: str, changes: dict[str, Any]) -> None:
    """From random weights no checkpoint says how many layers there are."""
    _, config = config_of(name, {}, 32)
    step = {"method": "fixed_point_training", "bits": 4, "init": "random"}
    images = {"dataset": {"source": "local", "id": "images.npz"}}
    spec = JobRequest(model="local:x", recipe=[step], calibration=images, evaluation=images).resolve()  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"too many layers|window_size 9 is more than"):
        plan_training(spec, {**config, "architectures": None, **changes}, {})


@pytest.mark.parametrize(
    "order", ["import quantry; import transformers", "import transformers; import quantry"]
)
def test_transformers_knows_the_small_resnet_after_import_quantry(order: str, tmp_path: Any) -> None:
    factories.write_convnet(tmp_path, "cifar_resnet")
    load = f"transformers.AutoModelForImageClassification.from_pretrained({str(tmp_path)!r})"
    code = f"{order}; print(type({load}).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "CifarResNetForImageClassification"
