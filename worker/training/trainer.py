"""The training loop: SGD on weights, Adam on ranges, the interval of gradients inside the backward pass."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from quantry.reports import EpochReport
from quantry.training import FixedPointTrainingStep
from worker.errors import TrainingDiverged
from worker.training.data import TrainingImages, batch_count, batches, seed_of
from worker.training.layers import FixedPointLayer, fixed_point_layers

EVALUATED_AT_ONCE = 256  # images
CHECKED = 32  # images whose logits are looked at after each epoch
Warn = Callable[[str], None]


@dataclass
class Trainer:
    """One network on its way through the epochs. With no fixed-point layer in it, it trains in full precision.

    curve: of the epochs that are done. tell: hears after each step how many batches of the epoch are done.
    """

    network: Any
    step: FixedPointTrainingStep
    seed: int
    device: torch.device
    tell: Callable[[int], None]
    warn: Warn
    curve: list[EpochReport] = field(default_factory=list)

    def __post_init__(self) -> None:
        place(self.network, self.device)
        self.layers: dict[str, FixedPointLayer] = fixed_point_layers(self.network)
        ranges = [p for layer in self.layers.values() for p in (layer.weight_range, layer.input_range)]
        known = set(map(id, ranges))
        weights = [p for p in self.network.parameters() if id(p) not in known and p.requires_grad]
        step = self.step
        assert step.learning_rate is not None  # the planner filled both in
        assert step.weight_decay is not None
        self.weights = torch.optim.SGD(
            weights, step.learning_rate, momentum=step.momentum, weight_decay=step.weight_decay
        )
        self.ranges = torch.optim.Adam(ranges, step.range_learning_rate) if ranges else None

    @property
    def gradients(self) -> dict[str, Any]:
        """The gradient quantizers, by layer."""
        return {name: layer.gradient for name, layer in self.layers.items() if layer.gradient is not None}

    def epoch(self, images: TrainingImages, held: TrainingImages | None) -> EpochReport:
        """Train one epoch more. Raises TrainingDiverged."""
        began, number = time.perf_counter(), len(self.curve)
        self._begin(number)
        size, count = self.step.batch_size, batch_count(len(images), self.step.batch_size)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, right answers
        reached = {name: torch.zeros((), device=self.device) for name in self.gradients}
        augmentation = self.step.augmentation or "none"
        parts = batches(images, size=size, seed=self.seed, epoch=number, augmentation=augmentation)
        for index, (pixels, labels) in enumerate(parts):
            self._set_rates(number + index / count)
            warming = not number and not index and self._warms
            self._mark(warming=warming, measuring=index + 1 == count)
            total += self._batch(pixels.to(self.device), labels.to(self.device), number, index, warming)
            for name, gradient in self.gradients.items():
                reached[name] = torch.maximum(reached[name], gradient.largest)
            self.tell(index + 1)
        self._check_reached(reached, number)
        self._check_finite(number)
        self._check_deployed(images, number)
        mean = (total / count).tolist()
        loss, accuracy = (None, None) if held is None else self.judge(held)
        if loss is not None and not math.isfinite(loss):
            raise TrainingDiverged(
                f"the validation loss after epoch {number + 1} is {loss}; lower learning_rate"
            )
        report = EpochReport(
            epoch=number + 1,
            loss=mean[0],
            accuracy=mean[1],
            learning_rate=self.weights.param_groups[0]["lr"],
            validation_loss=loss,
            validation_accuracy=accuracy,
            **self._intervals(),
            seconds=time.perf_counter() - began,
        )
        self.curve.append(report)
        return report

    @property
    def _warms(self) -> bool:
        grid = self.step.gradient
        return (
            bool(self.layers) and grid is not None and grid.warm_start and grid.interval == "large_gradient"
        )

    def _begin(self, epoch: int) -> None:
        """Seeds are those of the epoch, so that a resumed job goes on as if it had never stopped."""
        self.network.train()
        torch.manual_seed(seed_of(self.seed, epoch, 0))  # dropout
        for index, gradient in enumerate(self.gradients.values(), 1):
            gradient.reseed(seed_of(self.seed, epoch, index))

    def _mark(self, *, warming: bool, measuring: bool) -> None:
        for gradient in self.gradients.values():
            gradient.warming, gradient.measuring = warming, measuring

    def _set_rates(self, epochs: float) -> None:
        share = rate_share(self.step, epochs)
        assert self.step.learning_rate is not None
        self.weights.param_groups[0]["lr"] = self.step.learning_rate * share
        if self.ranges is not None:
            self.ranges.param_groups[0]["lr"] = self.step.range_learning_rate * share

    def _batch(self, pixels: Tensor, labels: Tensor, epoch: int, index: int, warming: bool) -> Tensor:
        """One step; (loss, share of right answers) float64. The warm-up only looks at gradients."""
        logits = self.network(pixel_values=pixels).logits
        loss = cross_entropy(logits, labels)
        if not math.isfinite(float(loss.detach())):
            raise TrainingDiverged(self._where(f"the loss is {float(loss.detach())}", epoch, index, pixels))
        self.weights.zero_grad(set_to_none=True)
        if self.ranges is not None:
            self.ranges.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self._check_gradients(epoch, index)
        if not warming:
            self.weights.step()
            if self.ranges is not None:
                self.ranges.step()
        right = (logits.detach().argmax(1) == labels).double().mean()
        return torch.stack([loss.detach().double(), right])

    def _check_gradients(self, epoch: int, index: int) -> None:
        """Raises TrainingDiverged, naming the layer nearest to the loss whose gradient is not finite."""
        found = self.gradients
        if not found:
            return
        finite = torch.stack([gradient.largest for gradient in found.values()]).isfinite()
        if not bool(finite.all()):
            layer = [name for name, good in zip(found, finite.tolist(), strict=True) if not good][-1]
            raise TrainingDiverged(_diverged(f"the gradient of {layer} is not finite", epoch, index))

    def _where(self, what: str, epoch: int, index: int, pixels: Tensor) -> str:
        """What happened, at which step, in which layer: the first whose output is not finite."""
        layer = first_non_finite(self.network, pixels)
        return _diverged(f"{what}; {layer}" if layer else what, epoch, index)

    def _check_reached(self, reached: dict[str, Tensor], epoch: int) -> None:
        """Warn of layers without any gradient; raise TrainingDiverged if there is no other."""
        dead = [name for name, largest in reached.items() if float(largest) == 0]
        if dead and len(dead) == len(reached):
            raise TrainingDiverged(
                f"every gradient of epoch {epoch + 1} is zero: the network no longer depends on its weights; lower "
                "learning_rate, or give more bits"
            )
        if dead:
            self.warn(
                f"epoch {epoch + 1}: no gradient reached {', '.join(dead)}; their weights and intervals stand still"
            )

    def _check_finite(self, epoch: int) -> None:
        """That the last step left numbers to go on with. Raises TrainingDiverged, naming the tensor."""
        for name, value in self.network.state_dict().items():
            if not bool(value.isfinite().all()):
                raise TrainingDiverged(f"{name} is not finite after epoch {epoch + 1}; lower learning_rate")

    def _check_deployed(self, images: TrainingImages, epoch: int) -> None:
        """That the network computes numbers as it would be deployed. Raises TrainingDiverged, naming the layer.

        Running averages of batch norm may be finite, but of another network than the weights are by now.
        """
        some = images.pixels(torch.arange(min(len(images), CHECKED)))
        self.network.eval()
        if not bool(self.logits(lambda part: some[part], len(some)).isfinite().all()):
            layer = first_non_finite(self.network, some.to(self.device)) or "no layer on its own"
            raise TrainingDiverged(
                f"the logits after epoch {epoch + 1} hold NaN or infinity; {layer}; lower learning_rate"
            )

    def _intervals(self) -> dict[str, dict[str, float]]:
        """Interval and errors of every layer, as EpochReport has them."""
        gamma = {name: round(float(gradient.gamma), 6) for name, gradient in self.gradients.items()}
        found: dict[str, dict[str, float]] = {"large_gradient_error": {}, "gradient_error": {}}
        for name, gradient in self.gradients.items():
            if gradient.large_error is not None and bool(gradient.large_error.isfinite()):
                found["large_gradient_error"][name] = float(gradient.large_error)
                found["gradient_error"][name] = float(gradient.error)
        return {"gamma": gamma, **found}

    def judge(self, images: TrainingImages) -> tuple[float, float]:
        """Mean loss and accuracy of the network as it would be deployed."""
        logits = self.logits(lambda part: images.pixels(part), len(images))
        loss = cross_entropy(logits.double(), images.labels)
        return float(loss), float((logits.argmax(1) == images.labels).double().mean())

    @torch.no_grad()
    def logits(self, read: Callable[[Tensor], Tensor], count: int) -> Tensor:
        """(count, classes) float32 on the CPU; `read` gives the pixels of some places."""
        self.network.eval()
        parts = torch.split(torch.arange(count), EVALUATED_AT_ONCE)
        return torch.cat(
            [self.network(pixel_values=read(p).to(self.device)).logits.float().cpu() for p in parts]
        )


def place(network: nn.Module, device: torch.device) -> None:
    """Move a network to where it trains, in the layout that float32 convolutions are fastest in there."""
    on_cpu = device.type == "cpu"
    network.to(device, memory_format=torch.channels_last if on_cpu else torch.contiguous_format)  # type: ignore[call-overload]


def rate_share(step: FixedPointTrainingStep, epochs: float) -> float:
    """What the learning rates are multiplied by after so many epochs, part of one included."""
    if step.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * epochs / step.epochs))
    if step.schedule == "step":
        passed = sum(int(epochs) >= math.ceil(share * step.epochs) for share in step.milestones)
        return float(step.decay**passed)
    return 1.0


def first_non_finite(network: nn.Module, pixels: Tensor) -> str | None:
    """The first layer, in the order they run, whose output holds NaN or infinity for these images."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not found and not bool(output.isfinite().all()):
                found.append(f"the first layer with such an output is {name}")

        return see

    leaves = [
        (name, m)
        for name, m in network.named_modules()
        if next(m.children(), None) is None or isinstance(m, FixedPointLayer)
    ]
    hooks = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            network(pixel_values=pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _diverged(what: str, epoch: int, index: int) -> str:
    return f"step {index + 1} of epoch {epoch + 1}: {what}; lower learning_rate, or give more bits"
