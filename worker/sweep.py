"""The block sweep: each block is visited once, for calibration, quantization and evaluation, then freed.

Streams: calibration windows through the float and the quantized network, evaluation windows through the
float, the round-to-nearest and the quantized network. A stored block is replayed, not computed again.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantry.contract import JobSpec
from quantry.jobs import State
from quantry.quantizers.affine import QuantizedLayer, QuantizedWeight
from quantry.recipe import RtnStep
from quantry.reports import BlockReport, LayerReport
from worker.block import BlockQuantizer, QuantizedBlock, install
from worker.calibration.store import BlockStore, FinishedBlock
from worker.calibration.streams import Stream, difference
from worker.dressing import Dressing
from worker.methods.rtn import rtn
from worker.metrics.layer_error import ErrorSum, layer_errors
from worker.metrics.quality import Judge, full_precision
from worker.models.network import Network, join, linears
from worker.progress import Progress


@dataclass
class Cost:
    """Seconds spent on quantization itself, in all attempts: statistics, methods and the calibration streams."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    _began: tuple[float, float] = field(default=(0.0, 0.0), repr=False)

    def __enter__(self) -> None:
        self._began = (time.perf_counter(), time.process_time())

    def __exit__(self, *_: object) -> None:
        self.add(time.perf_counter() - self._began[0], time.process_time() - self._began[1])

    def add(self, wall_s: float, cpu_s: float) -> None:
        """Count seconds that were spent elsewhere: by an earlier attempt."""
        self.wall_s += wall_s
        self.cpu_s += cpu_s


@dataclass(frozen=True)
class SweepResult:
    """quality: by metric and stream, `fp`, `rtn` and `quantized`; empty without evaluation."""

    layers: tuple[LayerReport, ...]
    blocks: tuple[BlockReport, ...]
    quality: dict[str, dict[str, float]]
    cost: Cost

    @property
    def perplexity(self) -> dict[str, float]:
        return self.quality.get("perplexity", {})


@dataclass
class _Streams:
    """deployed: as `given`, but with the biases of compensation that the base quantizer must not see."""

    given: Stream | None = None
    floating: Stream | None = None
    deployed: Stream | None = None
    evaluation: dict[str, Stream] = field(default_factory=dict)


class BlockSweep:
    """Quantize a model block by block.

    Args:
        calibration: token windows (windows, length) or pixels; used only if a step looks at data.
        evaluation: the same, or None for no evaluation.
        judge: from the streams that have left the last block to figures by metric and stream.
        dressing, nearest: what quantizes activations, in the result and in the round-to-nearest network.
        chosen: weights whose grid the activation step found. baseline: what round-to-nearest starts from,
            where the activation step has rewritten `model`.
    """

    def __init__(
        self,
        model: Network,
        spec: JobSpec,
        store: BlockStore,
        progress: Progress,
        calibration: Tensor | None,
        evaluation: Tensor | None,
        judge: Judge,
        *,
        dressing: Dressing | None = None,
        nearest: Dressing | None = None,
        chosen: Mapping[str, QuantizedWeight] | None = None,
        baseline: Network | None = None,
    ) -> None:
        self.model, self.spec, self.store, self.progress = model, spec, store, progress
        self.calibration, self.evaluation, self.judge = calibration, evaluation, judge
        self.dressing, self.nearest = dressing or Dressing(), nearest or Dressing()
        self.baseline = baseline or model
        positions = calibration.shape[1] if calibration is not None and calibration.ndim == 2 else None
        self.quantizer = BlockQuantizer(
            model, spec.weight_step, spec.compensation, positions, self.dressing, chosen
        )
        self.cost = Cost()

    @torch.no_grad()
    def run(self) -> SweepResult:
        """Sweep every block, then the head."""
        streams = self._embed()
        total, done = self.model.count, self.store.finished()
        layers: list[LayerReport] = []
        blocks: list[BlockReport] = []
        self.progress.stage(State.QUANTIZING, f"block {min(done + 1, total)} of {total}", done, total)
        for index in range(total):
            original = self.model.block(index)
            if index < done:
                finished = self.store.load(index, self.model.device)
                self.cost.add(finished.wall_s, finished.cpu_s)
                self._replay(index, original, finished.layers, streams)
                self.progress.advance(done, total, f"replaying block {index + 1} of {done}")
            else:
                finished = self._visit(index, original, streams)
                self.store.save(index, finished)
                self.progress.advance(index + 1, total, f"block {min(index + 2, total)} of {total}")
                self.progress.event("block", finished.report.model_dump(mode="json"))
            layers += finished.reports
            blocks.append(finished.report)
        windows = sum(len(stream.tokens) for stream in streams.evaluation.values())
        self.progress.stage(State.EVALUATING, "quality", 0, windows)
        quality = self.judge(streams.evaluation, self.progress) if streams.evaluation else {}
        return SweepResult(tuple(layers), tuple(blocks), quality, self.cost)

    @torch.no_grad()
    def reference(self, inputs: Tensor) -> Tensor:
        """What leaves the last block of the quantized network, from the stored blocks."""
        stream = Stream.embed(self.model, inputs)
        for index in range(self.model.count):
            block = self.model.block(index)
            self.dressing.dress(self.model.prefix(index), block)
            for name, layer in self.store.load(index, self.model.device).layers.items():
                install(block, name, layer)
            stream.advance(block, index)
        return stream.hidden

    @contextmanager
    def _full_precision(self, wanted: bool) -> Iterator[None]:
        """Embeddings and head as the checkpoint has them; else they are as the artifact stores them."""
        with full_precision(self.model, wanted):
            yield

    def _embed(self) -> _Streams:
        streams = _Streams()
        self.progress.stage(State.CALIBRATING, "embedding the windows")
        if self.evaluation is not None and self.spec.evaluation is not None:
            for name in ("quantized", *self.spec.evaluation.baselines):
                with self._full_precision(name == "fp"):
                    streams.evaluation[name] = Stream.embed(self.model, self.evaluation)
        if self.calibration is not None and self.quantizer.wants_statistics:
            streams.given = Stream.embed(self.model, self.calibration)
            if self.quantizer.wants_float:
                with self._full_precision(True):
                    streams.floating = Stream.embed(self.model, self.calibration)
            step = self.spec.compensation
            if step is not None and step.targets == "published" and "model" in (step.levels or ()):
                streams.deployed = Stream.embed(self.model, self.calibration)
        return streams

    def _visit(self, index: int, original: nn.Module, streams: _Streams) -> FinishedBlock:
        began, before = time.perf_counter(), copy.copy(self.cost)
        with self.cost:
            block = self.quantizer.quantize(index, original, streams.given, streams.floating)
            if streams.deployed is not None and streams.floating is not None:
                streams.deployed.advance(block.module, index)
                self.quantizer.compensate_end(index, block, streams.floating, streams.deployed)
        nearest = self._round_to_nearest(index, original) if "rtn" in streams.evaluation else None
        reports = self._layer_reports(index, original, block, nearest, streams)
        self._advance_evaluation(index, original, block.module, nearest, streams)
        report = _block_report(index, streams, time.perf_counter() - began)
        spent = self.cost.wall_s - before.wall_s, self.cost.cpu_s - before.cpu_s
        return FinishedBlock(block.layers, reports, report, *spent)

    def _replay(
        self, index: int, original: nn.Module, layers: dict[str, QuantizedLayer], streams: _Streams
    ) -> None:
        """Move every stream past a block that an earlier attempt finished."""
        module = copy.deepcopy(original)
        self.dressing.dress(self.model.prefix(index), module)
        nearest = self._round_to_nearest(index, original) if "rtn" in streams.evaluation else None
        step = self.spec.compensation
        published = step is not None and step.targets == "published"
        for name, layer in layers.items():  # as published, the base quantizer never saw the biases
            install(module, name, QuantizedLayer(layer.weight, None) if published else layer)
        for stream, block in ((streams.given, module), (streams.floating, original)):
            if stream is not None:
                stream.advance(block, index)
        if published:
            for name, layer in layers.items():
                install(module, name, layer)
        if streams.deployed is not None:
            streams.deployed.advance(module, index)
        self._advance_evaluation(index, original, module, nearest, streams)

    def _advance_evaluation(
        self, index: int, original: nn.Module, module: nn.Module, nearest: nn.Module | None, streams: _Streams
    ) -> None:
        floating = original if self.baseline is self.model else self.baseline.block(index)
        for name, block in (("fp", floating), ("rtn", nearest), ("quantized", module)):
            if name in streams.evaluation and block is not None:
                streams.evaluation[name].advance(block, index)

    def _round_to_nearest(self, index: int, original: nn.Module) -> nn.Module:
        """The block at the job's bits and groups, each weight to its nearest grid point, ranges unclipped."""
        step = self.spec.weight_step
        plain = RtnStep(bits=step.bits, group_size=step.group_size, symmetric=step.symmetric)
        module = copy.deepcopy(original) if self.baseline is self.model else self.baseline.block(index)
        self.nearest.dress(self.model.prefix(index), module)
        for name in linears(self.model, index):
            weight = rtn(self.baseline.weight(join(self.model.prefix(index), name)), plain)
            install(module, name, QuantizedLayer(weight, None))
        return module

    def _layer_reports(
        self,
        index: int,
        original: nn.Module,
        block: QuantizedBlock,
        nearest: nn.Module | None,
        streams: _Streams,
    ) -> tuple[LayerReport, ...]:
        """Every layer's output error on the first batch of held-out windows; none without evaluation."""
        errors = layer_errors(self.model, index, original, block, nearest, streams.evaluation)
        prefix = self.model.prefix(index)
        return tuple(_layer_report(join(prefix, name), name, block, errors) for name in block.layers)


def _layer_report(
    full: str, name: str, block: QuantizedBlock, errors: dict[str, dict[str, ErrorSum]]
) -> LayerReport:
    weight = block.layers[name].weight
    ours, nearest = errors["quantized"].get(name), errors["rtn"].get(name)
    added = block.added.get(name)
    return LayerReport(
        name=full,
        bits=weight.bits,
        group_size=weight.group_size,
        relative_mse=ours.relative if ours else None,
        relative_mse_rtn=nearest.relative if nearest else None,
        sqnr_db=ours.sqnr_db if ours else None,
        mean_error_before=ours.mean_error(added) if ours else None,
        mean_error_after=ours.mean_error(None) if ours else None,
        damping=block.damping.get(name),
    )


def _block_report(index: int, streams: _Streams, seconds: float) -> BlockReport:
    """Errors of the residual stream after the block; on the evaluation windows and the calibration windows."""
    evaluation = streams.evaluation
    ours = nearest = None
    mean_error = None
    if "fp" in evaluation:
        ours, mean_error = difference(evaluation["quantized"], evaluation["fp"])
        nearest = difference(evaluation["rtn"], evaluation["fp"])[0] if "rtn" in evaluation else None
    seen = None
    if streams.given is not None and streams.floating is not None:
        seen, calibration_mean = difference(streams.given, streams.floating)
        mean_error = calibration_mean if mean_error is None else mean_error
    return BlockReport(
        index=index,
        relative_mse=seen,
        relative_mse_evaluation=ours,
        relative_mse_rtn=nearest,
        mean_error=mean_error,
        seconds=seconds,
    )
