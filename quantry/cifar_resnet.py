"""ResNet-20 and its kin for small images (He et al. 2015, arXiv:1512.03385, section 4.2), as transformers loads models.

transformers' own ResNet begins with a 7x7 convolution of stride 2 and a pooling, which leave 8x8 of a 32x32 image, so
this is a model type of its own, `cifar_resnet`. Shortcuts have no parameters (option A: every second pixel, new
channels are zero); a batch norm precedes the linear layer, as in the code of arXiv:2407.12637.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, relu
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention
from transformers.models.resnet.modeling_resnet import ResNetConvLayer, ResNetPreTrainedModel


class CifarResNetConfig(PretrainedConfig):  # type: ignore[misc]  # transformers is untyped here
    """depths: blocks of each stage, two convolutions a block: [3, 3, 3] is ResNet-20. widths: channels of each."""

    model_type = "cifar_resnet"

    def __init__(
        self,
        num_channels: int = 3,
        image_size: int = 32,
        depths: Sequence[int] = (3, 3, 3),
        widths: Sequence[int] = (16, 32, 64),
        **kwargs: Any,
    ) -> None:
        self.num_channels, self.image_size = num_channels, image_size
        self.depths, self.widths = list(depths), list(widths)
        super().__init__(**kwargs)


class CifarBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            ResNetConvLayer(inputs, width, stride=stride), ResNetConvLayer(width, width, activation=None)
        )
        self.stride, self.added = stride, width - inputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        before = self.added // 2
        shortcut = pad(shortcut, (0, 0, 0, 0, before, self.added - before)) if self.added else shortcut
        return relu(self.layer(x) + shortcut)


class CifarResNetModel(nn.Module):
    """Images (N, channels, H, W) to features (N, last width)."""

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__()
        inputs = config.widths[0]
        self.embedder = ResNetConvLayer(config.num_channels, inputs)
        self.stages = nn.ModuleList()
        for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            blocks = nn.Sequential()
            for block in range(depth):
                blocks.append(CifarBlock(inputs, width, 2 if stage and not block else 1))
                inputs = width
            self.stages.append(blocks)
        self.normalization = nn.BatchNorm1d(inputs)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.embedder(pixel_values)
        for stage in self.stages:
            x = stage(x)
        features: Tensor = self.normalization(x.mean((2, 3)))
        return features


class CifarResNetForImageClassification(ResNetPreTrainedModel):  # type: ignore[misc]  # as above
    """`pixel_values` (N, channels, H, W) to logits (N, classes)."""

    config_class = CifarResNetConfig
    config: CifarResNetConfig
    base_model_prefix = "resnet"
    _no_split_modules = ("CifarBlock",)

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.resnet = CifarResNetModel(config)
        self.classifier = nn.Linear(config.widths[-1], config.num_labels)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutputWithNoAttention:
        logits = self.classifier(self.resnet(pixel_values))
        loss = None if labels is None else cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


AutoConfig.register("cifar_resnet", CifarResNetConfig, exist_ok=True)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification, exist_ok=True)
