"""What a pipeline does around its network in one step: labels, prompts, classifier-free guidance.

Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022, arXiv:2207.12598: output = u + scale (c - u), c with and u
without the condition, both in one batch. A sample's label or prompt belongs to its seed, so it is the same whenever and
in whatever batch the sample is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quantry.diffusion_checks import NO_CLASS

Seeds = Sequence[int]
UNSEEN = 1 << 45  # seeds from here on are for evaluation


class Predict(Protocol):
    """The prediction for latents x (batch, C, H, W) of these samples, in the shape of x."""

    def __call__(self, network: Any, x: Tensor, timestep: float, seeds: Seeds) -> Tensor: ...

    def inputs(self, seeds: Seeds) -> dict[str, Tensor]:
        """What the network is given beside latents and timestep, without guidance."""
        ...


@dataclass(frozen=True)
class Unconditional:
    """The network's output as it is."""

    def __call__(self, network: Any, x: Tensor, timestep: float, seeds: Seeds) -> Tensor:
        output: Tensor = network(x, _time(timestep, x), return_dict=False)[0]
        return output

    def inputs(self, seeds: Seeds) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class Labelled:
    """A U-Net with class labels, without guidance. classes: how many there are."""

    classes: int

    def __call__(self, network: Any, x: Tensor, timestep: float, seeds: Seeds) -> Tensor:
        labels = _labels(seeds, self.classes, x)
        output: Tensor = network(x, _time(timestep, x), class_labels=labels, return_dict=False)[0]
        return output

    def inputs(self, seeds: Seeds) -> dict[str, Tensor]:
        return {"class_labels": torch.tensor([seed % self.classes for seed in seeds])}


@dataclass(frozen=True)
class GuidedLabels:
    """A DiT with class labels. Of twice the channels it keeps the first half; the rest is a variance."""

    classes: int
    scale: float

    def __call__(self, network: Any, x: Tensor, timestep: float, seeds: Seeds) -> Tensor:
        labels = _labels(seeds, self.classes, x)
        if self.scale == 1:
            return self._run(network, x, timestep, labels)
        both = torch.cat([labels, torch.full_like(labels, NO_CLASS)])
        with_label, without = self._run(network, torch.cat([x, x]), timestep, both).chunk(2)
        return without + self.scale * (with_label - without)

    def _run(self, network: Any, x: Tensor, timestep: float, labels: Tensor) -> Tensor:
        times = torch.full((len(x),), timestep, device=x.device).long()
        output: Tensor = network(x, timestep=times, class_labels=labels, return_dict=False)[0]
        return output[:, : x.shape[1]]

    def inputs(self, seeds: Seeds) -> dict[str, Tensor]:
        return {"class_labels": torch.tensor([seed % self.classes for seed in seeds])}


@dataclass(frozen=True)
class GuidedPrompts:
    """A U-Net with text. prompts, unseen: of calibration and evaluation, (prompts, tokens, width).

    nothing: of the empty prompt, (1, tokens, width).
    """

    prompts: Tensor
    unseen: Tensor
    nothing: Tensor
    scale: float

    def __call__(self, network: Any, x: Tensor, timestep: float, seeds: Seeds) -> Tensor:
        text = self._of(seeds).to(x)
        if self.scale == 1:
            return self._run(network, x, timestep, text)
        both = torch.cat([self.nothing.to(x).expand_as(text), text])
        without, with_text = self._run(network, torch.cat([x, x]), timestep, both).chunk(2)
        return without + self.scale * (with_text - without)

    def _run(self, network: Any, x: Tensor, timestep: float, text: Tensor) -> Tensor:
        output: Tensor = network(x, timestep, encoder_hidden_states=text, return_dict=False)[0]
        return output

    def _of(self, seeds: Seeds) -> Tensor:
        tables = [self.unseen if seed >= UNSEEN else self.prompts for seed in seeds]
        return torch.stack([table[seed % len(table)] for table, seed in zip(tables, seeds, strict=True)])

    def inputs(self, seeds: Seeds) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self._of(seeds)}


def _time(timestep: float, x: Tensor) -> int | Tensor:
    """A timestep as networks take it: they would cut a fraction that is no tensor off."""
    return timestep if isinstance(timestep, int) else torch.full((len(x),), timestep, device=x.device)


def _labels(seeds: Seeds, classes: int, x: Tensor) -> Tensor:
    assert len(seeds) == len(x), "labels belong to samples"
    return torch.tensor([seed % classes for seed in seeds], device=x.device)
