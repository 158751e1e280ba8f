"""Quantize one block: gather statistics group by group, quantize, compensate, install."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor, nn

from quantry.quantizers.affine import QuantizedLayer, QuantizedWeight
from quantry.recipe import BiasCompensationStep, GptqStep, WeightStep
from worker.calibration.halves import Halves, Parts
from worker.calibration.hooks import outputs_of
from worker.calibration.statistics import InputStatistics
from worker.calibration.streams import Stream
from worker.calibration.walk import Passage, Rerun, passage
from worker.compensation import Compensator, MeanError, merged
from worker.dressing import Dressing
from worker.errors import CalibrationError
from worker.memory import release_memory
from worker.models.calls import run_block
from worker.models.network import Network, as_tokens, join
from worker.steps import WEIGHT_STEPS, WeightResult, needs_statistics


@dataclass
class QuantizedBlock:
    """layers: by name inside the block. module: a copy of the block that computes with them.
    added: the bias that compensation added to each layer, (out,). damping: what each layer's Hessian needed."""

    layers: dict[str, QuantizedLayer]
    module: nn.Module
    added: dict[str, Tensor]
    damping: dict[str, float]


class BlockQuantizer:
    """The recipe of a job, applied to one block after the other.

    positions: tokens of a calibration window, for models whose layers see them flattened. dressing: what
    quantizes the activations. chosen: weights whose grid the activation method found itself.
    """

    def __init__(
        self,
        model: Network,
        step: WeightStep,
        compensation: BiasCompensationStep | None,
        positions: int | None,
        dressing: Dressing | None = None,
        chosen: Mapping[str, QuantizedWeight] | None = None,
    ) -> None:
        self.model, self.step, self.positions = model, step, positions
        self.compensation = Compensator(model, compensation) if compensation else None
        self.dressing = dressing or Dressing()
        self.chosen = chosen or {}

    @property
    def wants_statistics(self) -> bool:
        return needs_statistics(self.step) or self.compensation is not None

    @property
    def wants_float(self) -> bool:
        """Whether the float stream is needed beside the quantized one."""
        return self._asymmetric or self.compensation is not None

    def quantize(
        self, index: int, original: nn.Module, given: Stream | None, floating: Stream | None
    ) -> QuantizedBlock:
        """Quantize block `index` and move both calibration streams past it.

        given: what the quantized prefix computes. floating: what the float prefix computes.
        """
        block = QuantizedBlock({}, copy.deepcopy(original), {}, {})
        self.dressing.dress(self.model.prefix(index), block.module)
        late: dict[str, Tensor] = {}
        groups = self.model.groups(index)
        passages = self._passages(index, original, block, given, floating)
        again = self.compensation is not None and not self._published and self.compensation.of_ends(index)
        entered = given.hidden.clone() if again and given is not None else None
        if self.sequential:
            for group in groups:
                statistics = self._gather(index, original, group, *passages)
                release_memory()
                self._quantize_group(index, group, statistics, block, late)
                del statistics
                release_memory()
        else:
            ahead = [self._gather(index, original, group, *passages) for group in groups]
            for done in passages:
                if done is not None:
                    done.close()
            for group, statistics in zip(groups, ahead, strict=True):
                self._quantize_group(index, group, statistics, block, late)
            passages = self._passages(index, original, block, given, floating)
        if passages[0] is not None:
            for _ in passages[0].finish():
                pass
        for name, bias in late.items():  # as published: the base quantizer never saw these biases
            self._add_bias(block, name, bias)
        if floating is not None and passages[1] is not None and not self._float_leaves:
            end = self._compensate_units(index, original, block, floating, passages[1])
            self._finish_float(index, block, floating, end)
        if entered is not None and given is not None and floating is not None:
            self.compensate_end(index, block, floating, given)
            given.hidden = entered  # once more, so that a resumed job sees the same bits
            given.advance(block.module, index)
        release_memory()
        return block

    def compensate_end(self, index: int, block: QuantizedBlock, floating: Stream, deployed: Stream) -> None:
        """Compensate what the networks have computed up to the end of the block, where a level asks for it."""
        layer = self.compensation.of_ends(index) if self.compensation else None
        if self.compensation and layer:
            self._add_bias(block, layer, self.compensation.of_streams(floating, deployed))

    @property
    def sequential(self) -> bool:
        """Whether the later layers of a block see the earlier ones quantized."""
        return not isinstance(self.step, GptqStep) or self.step.true_sequential

    @property
    def _asymmetric(self) -> bool:
        return isinstance(self.step, GptqStep) and self.step.target == "asymmetric"

    @property
    def _published(self) -> bool:
        return self.compensation is not None and self.compensation.published

    @property
    def _float_leaves(self) -> bool:
        """Whether the float stream leaves a block as soon as the last group of layers has seen its inputs."""
        return self.sequential and not self._published

    def _passages(
        self,
        index: int,
        original: nn.Module,
        block: QuantizedBlock,
        given: Stream | None,
        floating: Stream | None,
    ) -> tuple[Passage | None, Passage | None]:
        return (
            self._passage(index, block.module, given, replaced=True) if given else None,
            self._passage(index, original, floating, replaced=False) if floating else None,
        )

    def _passage(self, index: int, module: nn.Module, stream: Stream, *, replaced: bool) -> Passage:
        names = [group[0] for group in self.model.groups(index)]
        layers = [module.get_submodule(name) for name in names]
        halves = self.model.halves
        if halves is not None and self._float_leaves and not self.dressing.quantizers:
            return Halves(
                module,
                Parts(*(module.get_submodule(part) for part in halves)),
                layers,
                stream,
                index,
                replaced=replaced,
            )
        columns = max(self.model.columns(join(self.model.prefix(index), name)) for name in names)
        return passage(module, layers, stream, index, columns)

    def _gather(
        self,
        index: int,
        original: nn.Module,
        group: tuple[str, ...],
        given: Passage | None,
        floating: Passage | None,
    ) -> InputStatistics | None:
        """The statistics of the input that the layers of `group` share."""
        if given is None:
            return None
        name = join(self.model.prefix(index), group[0])
        columns = self.model.columns(name)
        statistics: InputStatistics | None = None
        leave = self._float_leaves and group is self.model.groups(index)[-1]
        layer = original.get_submodule(group[0])
        alone = self._asymmetric and leave and len(group) == 1 and not isinstance(layer, nn.Conv2d)
        made: list[Tensor] = []
        inputs = given.inputs()
        with outputs_of({name: layer} if alone else {}, lambda _, y: made.append(without_bias(layer, y))):
            for x_f in repeat(None) if floating is None else floating.inputs(leave=leave):
                x_q = next(inputs, None)
                if x_q is None:
                    break
                y_f = made.pop() if made else None
                seen = self._tokens(layer, x_q, columns)
                statistics = statistics or self._statistics(seen, y_f)
                statistics.update(seen, None if x_f is None else self._tokens(layer, x_f, columns), y_f)
                del x_f, x_q, y_f, seen  # the next forward has their memory
        next(inputs, None)  # it has ended
        if statistics is None:
            raise CalibrationError(f"calibration gave {name} no token: give more windows")
        return statistics.mean(name)

    def _tokens(self, layer: nn.Module, x: Tensor, columns: int) -> Tensor:
        if self.positions is not None:  # OPT runs its MLP on (tokens, width)
            return x.view(-1, self.positions, columns)
        return as_tokens(layer, x)

    def _statistics(self, x: Tensor, y_f: Tensor | None) -> InputStatistics:
        outputs = x.shape[-1] if y_f is None else y_f.shape[-1]
        return InputStatistics.zeros(
            x.shape[-1],
            hessian=needs_statistics(self.step),
            cross=self._asymmetric,
            positions=x.shape[1] if self._per_position else None,
            device=self.model.device,
            outputs=outputs if outputs < x.shape[-1] else None,
        )

    def _quantize_group(
        self,
        index: int,
        group: tuple[str, ...],
        statistics: InputStatistics | None,
        block: QuantizedBlock,
        late: dict[str, Tensor],
    ) -> None:
        full = [join(self.model.prefix(index), name) for name in group]
        weights = [self.model.weight(name) for name in full]
        if all(name in self.chosen for name in full):
            result = WeightResult([self.chosen[name] for name in full])
        else:
            result = WEIGHT_STEPS[type(self.step)](weights, statistics, self.step)
        for name, path, weight, quantized in zip(group, full, weights, result.weights, strict=True):
            block.layers[name] = QuantizedLayer(quantized, self.model.bias(path))
            if result.damping is not None:
                block.damping[name] = result.damping
            install(block.module, name, block.layers[name])
            if self.compensation is None or statistics is None or not self.compensation.corrects(index, name):
                continue
            bias = self.compensation.of_layer(weight, quantized.dequantize(), statistics)
            if self._published:
                late[name] = bias
            else:
                self._add_bias(block, name, bias)

    @property
    def _per_position(self) -> bool:
        return self.compensation is not None and self.compensation.per_position

    def _add_bias(self, block: QuantizedBlock, name: str, bias: Tensor) -> None:
        block.layers[name] = merged(block.layers[name], bias)
        added = bias.mean(0) if bias.ndim == 2 else bias
        block.added[name] = block.added.get(name, torch.zeros_like(added)) + added
        install(block.module, name, block.layers[name])

    def _compensate_units(
        self, index: int, original: nn.Module, block: QuantizedBlock, floating: Stream, floats: Passage
    ) -> Passage:
        """As published, the biases of the modules inside the block; returns what takes the float stream to its end."""
        if self.compensation is None or not self.compensation.units(index):
            return floats
        floats.close()
        for name, bias in self.compensation.of_units(index, original, block.module, floating).items():
            self._add_bias(block, name, bias)
        return Rerun(original, (), floating, index)

    def _finish_float(self, index: int, block: QuantizedBlock, floating: Stream, floats: Passage) -> None:
        """Move the float stream on; as published, fit the block's own output bias on float inputs on the way."""
        layer = self.compensation.of_block(index) if self.compensation and self._published else None
        mean = MeanError(self._per_position)
        for where, states, out in floats.finish():
            if layer is not None:
                call = floating.calls[where.stop - where.start][index]
                mean.add(out, run_block(block.module, states, call))
        if layer is not None:
            self._add_bias(block, layer, mean.value)


def install(module: nn.Module, name: str, layer: QuantizedLayer) -> None:
    """Make layer `name` of a block compute with the quantized weight and its biases."""
    linear = module.get_submodule(name)
    assert isinstance(linear.weight, Tensor)
    weight = layer.weight.dequantize()
    linear.weight.copy_(weight.T if _is_conv1d(linear) else weight.view(linear.weight.shape))
    if layer.bias is not None:
        bias = layer.bias.to(linear.weight.dtype)
        linear.bias = nn.Parameter(bias, requires_grad=False)
    for hook in list(linear._forward_hooks):
        del linear._forward_hooks[hook]
    if layer.position_bias is not None:
        shift = layer.position_bias.to(linear.weight.dtype)
        if isinstance(linear, nn.Conv2d):  # (images, out, rows, columns): positions are patches
            linear.register_forward_hook(lambda _m, _i, out: out + shift.T.reshape(out.shape[1:]))
        else:
            linear.register_forward_hook(
                lambda _m, _i, out: (out.view(-1, *shift.shape) + shift).view_as(out)
            )


def without_bias(layer: nn.Module, y: Tensor) -> Tensor:
    """W x, of the output y = W x + b of a linear layer."""
    return y - layer.bias if isinstance(layer.bias, Tensor) else y


def _is_conv1d(linear: nn.Module) -> bool:
    return type(linear).__name__ == "Conv1D"
