"""Failures that a user can act on. Each has a stable `type`; its message is written for the user."""

from __future__ import annotations

from quantry.jobs import JobError


class QuantizationError(Exception):
    """Base of the failures that end a job with a reason. The message says what, where and what to do."""

    type = "quantization-failed"
    title = "The model could not be quantized"
    retryable = False

    def as_job_error(self) -> JobError:
        return JobError(type=self.type, title=self.title, detail=str(self), retryable=self.retryable)


class ModelError(QuantizationError):
    """The checkpoint is missing, malformed, or of a kind that is refused."""

    type = "model-refused"
    title = "The model cannot be used"


class ModelNotFound(ModelError):
    type = "model-not-found"
    title = "The model, revision or file does not exist"


class HubUnreachable(ModelError):
    type = "hub-unreachable"
    title = "The model hub did not answer"
    retryable = True


class DatasetError(QuantizationError):
    """The text is missing, malformed, too short, or overlaps where it must not."""

    type = "dataset-refused"
    title = "The text or the images cannot be used"


class CalibrationError(QuantizationError):
    """Calibration met values that no grid can be fitted to."""

    type = "calibration-failed"
    title = "Calibration failed"


class NonFiniteError(CalibrationError):
    type = "non-finite"
    title = "The model produced NaN or infinity"


class TrainingDiverged(QuantizationError):
    """The loss or a gradient became NaN or infinite; the message says at which step and in which layer."""

    type = "training-diverged"
    title = "Training diverged"


class RecipeError(QuantizationError):
    """The recipe does not fit this model."""

    type = "recipe-refused"
    title = "The recipe does not fit the model"


class ExportError(QuantizationError):
    type = "export-failed"
    title = "The checkpoint could not be written"


class VerificationError(ExportError):
    """The written checkpoint, loaded afresh, does not compute what the worker computed."""

    type = "verification-failed"
    title = "The written checkpoint does not reproduce the worker's logits"


class DeviceError(QuantizationError):
    type = "device-unavailable"
    title = "The device asked for is not available"


class OutOfMemory(QuantizationError):
    type = "out-of-memory"
    title = "The job ran out of memory"
    retryable = True


class DiskFull(QuantizationError):
    type = "disk-full"
    title = "The disk is full"
    retryable = True
