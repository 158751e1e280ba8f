"""What comes back: the plan of a dry run, the report of a job, the manifest of its files.

Sizes are bytes, durations seconds.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from quantry.base import Model
from quantry.contract import JobSpec


class QualityRow(Model):
    """One metric for full precision, round-to-nearest at the same bits, and the job's result."""

    metric: str
    dataset: str
    samples: int
    fp: float | None = None
    rtn: float | None = None
    quantized: float | None = None


class FileEntry(Model):
    path: str
    bytes: int
    sha256: str


class Loader(Model):
    """How to load the artifact: the package to install and the lines to run."""

    package: str
    version: str
    snippet: str


class Manifest(Model):
    """`manifest.json`: every file of the artifact with its digest (but the manifest itself).

    sampling: of a diffusion pipeline, the sampler that its quantizers were calibrated for.
    """

    job: str | None
    format: str
    loader: Loader
    files: tuple[FileEntry, ...]
    sampling: dict[str, Any] | None = None


class LayerReport(Model):
    """The output error of one layer in the quantized network, against the float network, on held-out windows.

    Without an evaluation nothing is held out and the errors are null.
    """

    name: str
    bits: int
    group_size: int | None
    relative_mse: float | None = None
    relative_mse_rtn: float | None = None
    sqnr_db: float | None = None
    mean_error_before: float | None = Field(
        None, description="rms over channels of the mean output error, before compensation"
    )
    mean_error_after: float | None = None
    damping: float | None = Field(
        None, description="share of the mean diagonal that made the Hessian positive definite"
    )
    warnings: tuple[str, ...] = ()


class BlockReport(Model):
    """Error of the residual stream after one block, against the float network's.

    relative_mse: on the calibration windows. relative_mse_evaluation, relative_mse_rtn: on the evaluation
    windows. mean_error: rms over channels of the mean error. Null where nothing was measured.
    """

    index: int
    relative_mse: float | None = None
    relative_mse_evaluation: float | None = None
    relative_mse_rtn: float | None = None
    mean_error: float | None = None
    seconds: float


class OperandReport(Model):
    """One quantized activation: its place, what it is, its grid, and its error on the calibration data.

    kind: image, post_norm, attention_output, post_activation, head_input, query, key, value, probabilities; input in a
    language model.
    row_sum_before, row_sum_after: mean sum of a row of probabilities, without and with the softmax correction.
    """

    name: str
    kind: str
    bits: int
    quantizer: str
    sqnr_db: float | None = None
    row_sum_before: float | None = None
    row_sum_after: float | None = None


class BitOperations(Model):
    """Bit operations of one forward: `base` with static grids, `overhead` of what is found at run time."""

    base: float
    overhead: float


class StepGroup(Model):
    """Steps [first, last) that AccuQuant calibrated together: the mean squared error of the latent at their end.

    before, after: training; on the calibration samples. seconds: of wall time.
    """

    first: int
    last: int
    before: float
    after: float
    seconds: float


class TrajectoryReport(Model):
    """Squared errors of the latent after each sampling step, against full precision from the same seed.

    Means over the latent's elements and over `samples` seeds that calibration has not seen. single: one quantized
    step from a full-precision latent; accumulated: every step so far quantized. _rtn: round to nearest, None where it
    was not asked for. noise_kept: of each step, the part of the sampler's noise (its standard deviation) that is still
    added where quantization's own noise takes the place of the rest. pictures: the first samples of each network, as
    paths of PNG files in the artifact.
    """

    scheduler: str
    eta: float
    timesteps: tuple[int | float, ...]
    samples: int
    single: tuple[float, ...]
    accumulated: tuple[float, ...]
    single_rtn: tuple[float, ...] | None = None
    accumulated_rtn: tuple[float, ...] | None = None
    noise_kept: tuple[float, ...] | None = None
    groups: tuple[StepGroup, ...] = ()
    pictures: dict[str, str] = Field(default_factory=dict)


class SizeReport(Model):
    fp_bytes: int
    quantized_bytes: int
    effective_bits: float = Field(
        description="per quantized weight, with scales, zero-points and added biases"
    )
    quantized_weights: int
    added_bias_bytes: int = 0


class CostReport(Model):
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    peak_device_bytes: int | None = None
    quantize_wall_s: float | None = Field(None, description="the block sweep without its evaluation streams")
    quantize_cpu_s: float | None = None


class EpochReport(Model):
    """One epoch of training: means over its batches; accuracies are shares.

    gamma: half-width of the grid of each layer's gradient over the largest gradient, after the epoch.
    large_gradient_error, gradient_error: mean |g - g_hat| / max|g| of the epoch's last batch, over the top share alpha
    of the gradients and over all; a layer without a gradient is left out.
    """

    epoch: int
    loss: float
    accuracy: float
    learning_rate: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    gamma: dict[str, float] = Field(default_factory=dict)
    large_gradient_error: dict[str, float] = Field(default_factory=dict)
    gradient_error: dict[str, float] = Field(default_factory=dict)
    seconds: float


class TrainedLayerReport(Model):
    """A layer that trained in fixed point.

    gradients: of a batch. active: whether they were enough for the large-gradient rule; null: another rule, or none.
    weight_range, input_range: learned. signed: whether its inputs have a sign.
    """

    name: str
    gradients: int
    active: bool | None
    weight_range: float
    input_range: float
    signed: bool


class KeptLayerReport(Model):
    """A layer that stayed in full precision, and why."""

    name: str
    reason: str


class TrainingReport(Model):
    """How a network was trained, and the same training in full precision where the job asked for `fp`.

    kept_epoch: whose weights the artifact has. stopped: why before the last epoch, null if not.
    """

    init: str
    images: int
    validation_images: int
    batch_size: int
    interval: str | None
    kept_epoch: int
    stopped: str | None = None
    epochs: tuple[EpochReport, ...]
    fp_epochs: tuple[EpochReport, ...] = ()
    layers: tuple[TrainedLayerReport, ...]
    kept: tuple[KeptLayerReport, ...]


class LayerPlan(Model):
    """What a dry run says of one layer."""

    name: str
    shape: tuple[int, int]
    quantized: bool
    reason: str | None = None


class Estimate(Model):
    """A dry run from the config and the safetensors headers: nothing is loaded, nothing is computed."""

    spec: JobSpec
    format: str
    architecture: str
    parameters: int
    layers: tuple[LayerPlan, ...]
    fp_bytes: int
    quantized_bytes: int
    effective_bits: float
    peak_memory_bytes: int
    seconds_low: float
    seconds_high: float
    warnings: tuple[str, ...] = ()


class Report(Model):
    """`report.json`: the proof that comes with a checkpoint. `spec` is what was run, fully resolved."""

    job: str | None = None
    spec: JobSpec | None = None
    quality: tuple[QualityRow, ...]
    size: SizeReport
    layers: tuple[LayerReport, ...]
    blocks: tuple[BlockReport, ...]
    operands: tuple[OperandReport, ...] = ()
    bit_operations: BitOperations | None = None
    trajectory: TrajectoryReport | None = None
    training: TrainingReport | None = None
    cost: CostReport
    estimate: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, str]
    fingerprint: str
    format: str
    warnings: tuple[str, ...] = ()
    verification: dict[str, float | str] = Field(default_factory=dict)
