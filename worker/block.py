"""Quantize one block: gather statistics group by group, quantize, compensate, install."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import Tensor, nn

from quantry.contract import BiasCompensationStep, GptqStep, RtnStep
from quantry.families import block_bias_layer
from quantry.quantizers.affine import QuantizedLayer
from worker.calibration.statistics import InputStatistics
from worker.calibration.streams import Stream
from worker.calibration.walk import Passage, passage
from worker.methods.bias_compensation import channel_bias, position_bias
from worker.models.causal_lm import CausalLM, run_block
from worker.steps import WEIGHT_STEPS, needs_statistics


@dataclass
class QuantizedBlock:
    """layers: by name inside the block. module: a copy of the block that computes with them.
    added: the bias that compensation added to each layer, (out,). damping: what each layer's Hessian needed."""

    layers: dict[str, QuantizedLayer]
    module: nn.Module
    added: dict[str, Tensor]
    damping: dict[str, float]


class BlockQuantizer:
    """The recipe of a job, applied to one block after the other. positions: tokens of a calibration window."""

    def __init__(
        self,
        model: CausalLM,
        step: RtnStep | GptqStep,
        compensation: BiasCompensationStep | None,
        positions: int,
    ) -> None:
        self.model, self.step, self.compensation, self.positions = model, step, compensation, positions

    @property
    def wants_statistics(self) -> bool:
        return needs_statistics(self.step) or self.compensation is not None

    @property
    def wants_float(self) -> bool:
        """Whether the float stream is needed beside the quantized one."""
        asymmetric = isinstance(self.step, GptqStep) and self.step.target == "asymmetric"
        return asymmetric or self.compensation is not None

    def quantize(
        self, index: int, original: nn.Module, given: Stream | None, floating: Stream | None
    ) -> QuantizedBlock:
        """Quantize block `index` and move both calibration streams past it.

        given: what the quantized prefix computes. floating: what the float prefix computes.
        """
        block = QuantizedBlock({}, copy.deepcopy(original), {}, {})
        late: dict[str, Tensor] = {}
        if self.sequential:
            passages = self._passages(index, original, block, given, floating)
            for group in self.model.family.groups:
                self._quantize_group(index, group, self._gather(index, group, *passages), block, late)
        else:
            passages = self._passages(index, original, block, given, floating)
            ahead = [self._gather(index, group, *passages) for group in self.model.family.groups]
            for done in passages:
                if done is not None:
                    done.close()
            for group, statistics in zip(self.model.family.groups, ahead, strict=True):
                self._quantize_group(index, group, statistics, block, late)
            passages = self._passages(index, original, block, given, floating)
        if passages[0] is not None:
            for _ in passages[0].finish():
                pass
        for name, bias in late.items():  # as published: the base quantizer never saw these biases
            self._add_bias(block, name, bias)
        if floating is not None and passages[1] is not None:
            self._finish_float(index, block, floating, passages[1])
        return block

    @property
    def sequential(self) -> bool:
        """Whether the later layers of a block see the earlier ones quantized."""
        return not isinstance(self.step, GptqStep) or self.step.true_sequential

    def _passages(
        self,
        index: int,
        original: nn.Module,
        block: QuantizedBlock,
        given: Stream | None,
        floating: Stream | None,
    ) -> tuple[Passage | None, Passage | None]:
        family = self.model.family
        stops = [group[0] for group in family.groups]
        columns = max(self.model.columns(f"{family.blocks}.{index}.{name}") for name in stops)
        pairs = ((block.module, given), (original, floating))
        first, second = (
            passage(module, [module.get_submodule(n) for n in stops], stream, index, columns)
            if stream
            else None
            for module, stream in pairs
        )
        return first, second

    def _gather(
        self, index: int, group: tuple[str, ...], given: Passage | None, floating: Passage | None
    ) -> InputStatistics | None:
        """The statistics of the input that the layers of `group` share."""
        if given is None:
            return None
        name = f"{self.model.family.blocks}.{index}.{group[0]}"
        columns = self.model.columns(name)
        cross = isinstance(self.step, GptqStep) and self.step.target == "asymmetric"
        positions = self.positions if self._per_position else None
        statistics = InputStatistics.zeros(
            columns,
            hessian=needs_statistics(self.step),
            cross=cross,
            positions=positions,
            device=self.model.device,
        )
        floats = repeat(None) if floating is None else floating.inputs()
        for x_q, x_f in zip(given.inputs(), floats, strict=False):
            shape = (-1, self.positions, columns)  # OPT runs its MLP on (tokens, width)
            statistics.update(x_q.view(shape), None if x_f is None else x_f.view(shape))
        return statistics.mean(name)

    def _quantize_group(
        self,
        index: int,
        group: tuple[str, ...],
        statistics: InputStatistics | None,
        block: QuantizedBlock,
        late: dict[str, Tensor],
    ) -> None:
        prefix = f"{self.model.family.blocks}.{index}"
        weights = [self.model.weight(f"{prefix}.{name}") for name in group]
        result = WEIGHT_STEPS[type(self.step)](weights, statistics, self.step)
        for name, weight, quantized in zip(group, weights, result.weights, strict=True):
            block.layers[name] = QuantizedLayer(quantized, self.model.bias(f"{prefix}.{name}"))
            if result.damping is not None:
                block.damping[name] = result.damping
            install(block.module, name, block.layers[name])
            if self.compensation is None or statistics is None:
                continue
            bias = self._compensation(weight, quantized.dequantize(), statistics)
            if self.compensation.targets == "published":
                late[name] = bias
            else:
                self._add_bias(block, name, bias)

    @property
    def _per_position(self) -> bool:
        return self.compensation is not None and self.compensation.granularity == "position_channel"

    def _compensation(self, w: Tensor, w_q: Tensor, statistics: InputStatistics) -> Tensor:
        """The bias to add: (out,), or (positions, out)."""
        assert self.compensation is not None
        published = self.compensation.targets == "published"
        given = statistics.sum_f if published else statistics.sum_q
        compute = position_bias if self._per_position else channel_bias
        return compute(w, w_q, statistics.sum_f, given)

    def _add_bias(self, block: QuantizedBlock, name: str, bias: Tensor) -> None:
        layer = block.layers[name]
        if bias.ndim == 2:
            total = bias if layer.position_bias is None else layer.position_bias + bias
            block.layers[name] = replace(layer, position_bias=total)
        else:
            merged = bias if layer.bias is None else layer.bias + bias
            block.layers[name] = replace(
                layer, bias=merged, added_bias=layer.added_bias or layer.bias is None
            )
        added = bias.mean(0) if bias.ndim == 2 else bias
        block.added[name] = block.added.get(name, torch.zeros_like(added)) + added
        install(block.module, name, block.layers[name])

    def _finish_float(self, index: int, block: QuantizedBlock, floating: Stream, floats: Passage) -> None:
        """Move the float stream on; as published, fit the block's own output bias on float inputs on the way."""
        published = self.compensation is not None and self.compensation.targets == "published"
        layer = block_bias_layer(self.model.family, self.model.config.to_dict()) if published else None
        axes = (0,) if self._per_position else (0, 1)
        total: Tensor | None = None
        for where, states, out in floats.finish():
            if layer is None:
                continue
            call = floating.calls[where.stop - where.start][index]
            error = (out.float() - run_block(block.module, states, call).float()).sum(
                axes, dtype=torch.float64
            )
            total = error if total is None else total + error
        if layer is not None and total is not None:
            count = len(floating.hidden) if self._per_position else floating.tokens.numel()
            self._add_bias(block, layer, (total / count).float())


def install(module: nn.Module, name: str, layer: QuantizedLayer) -> None:
    """Make layer `name` of a block compute with the quantized weight and its biases."""
    linear = module.get_submodule(name)
    assert isinstance(linear.weight, Tensor)
    weight = layer.weight.dequantize()
    linear.weight.copy_(
        weight if linear.weight.shape == weight.shape and not _is_conv1d(linear) else weight.T
    )
    if layer.bias is not None:
        bias = layer.bias.to(linear.weight.dtype)
        linear.bias = nn.Parameter(bias, requires_grad=False)
    for hook in list(linear._forward_hooks):
        del linear._forward_hooks[hook]
    if layer.position_bias is not None:
        shift = layer.position_bias.to(linear.weight.dtype)
        linear.register_forward_hook(lambda _m, _i, out: (out.view(-1, *shift.shape) + shift).view_as(out))


def _is_conv1d(linear: nn.Module) -> bool:
    return type(linear).__name__ == "Conv1D"
