"""The job contract: a job in its full form, and what the server says of methods, datasets and errors.

Everything here is frozen, refuses unknown fields and needs no torch. Sizes are bytes, durations seconds,
times RFC 3339 UTC.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from quantry.base import Label, Metric, Model, Name, SpecError
from quantry.recipe import (
    AccuquantStep,
    ActivationStep,
    BiasCompensationStep,
    SmoothquantStep,
    SoftmaxBiasStep,
    Step,
    TrainingStep,
    UniformStep,
    WeightStep,
    check_recipe,
)
from quantry.sampling import Sampling

Written = Literal["compressed-tensors", "gptq", "gguf", "quantry", "onnx"]
Format = Literal["auto"] | Written


class ModelRef(Model):
    """Where the full-precision checkpoint is.

    `bundled` names one that Quantry ships, `hub` a repository of the model hub, `local` a folder below one
    of the server's QUANTRY_MODEL_ROOTS (absolute, or relative to a root).
    """

    source: Literal["hub", "bundled", "local"]
    id: Name
    revision: Name | None = Field(None, description="hub: branch, tag or commit; the job stores the commit")

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """`bundled/opt-tiny`, `/folder` or `local:folder`, else `owner/name[@revision]` of the hub."""
        if text.startswith("bundled/"):
            return cls(source="bundled", id=text)
        if text.startswith("/"):
            return cls(source="local", id=text)
        if text.startswith("local:"):
            return cls(source="local", id=text.removeprefix("local:"))
        name, at, revision = text.removeprefix("hub:").partition("@")
        return cls(source="hub", id=name, revision=revision if at else None)


class DatasetRef(Model):
    """A text: plain (.txt), JSON lines (.jsonl) or Parquet (.parquet), and which part of it; or images.

    `split` of a bundled text is its own; of any other text `train` is the first nine tenths of its
    documents (of its characters, if it is one document), `test` the last tenth, `all` the whole.
    Images are an .npz file (`images`, `labels`), split likewise, or with a split of its own (`x_calib` or
    `x_train`, and `x_test`, with `y_...`); or, `local` and `upload`, JPEG and PNG files with labels.csv.
    """

    source: Literal["bundled", "local", "upload", "hub"]
    id: Name
    revision: Name | None = Field(None, description="hub: branch, tag or commit; the job stores the commit")
    file: Name | None = Field(None, description="hub: the file inside the dataset repository")
    split: Literal["train", "test", "all"] | None = Field(
        None, description="null: train for calibration, test for evaluation"
    )
    field: Name = Field("text", description="jsonl and parquet: the field that holds a document")
    separator: str | None = Field(
        None, min_length=1, max_length=64, description="txt: the string between two documents"
    )

    @classmethod
    def parse(cls, text: str) -> DatasetRef:
        """`bundled/pydoc`, `/file`, `local:file`, `ds_...` of an upload, else `hub:owner/name:file`."""
        return cls.model_validate(_named_dataset(text))


def _named_dataset(value: Any) -> Any:
    """The fields of a DatasetRef that a name stands for; what is no name is left as it is."""
    if not isinstance(value, str):
        return value
    if value.startswith("bundled/"):
        return {"source": "bundled", "id": value}
    if value.startswith("/"):
        return {"source": "local", "id": value}
    if value.startswith("local:"):
        return {"source": "local", "id": value.removeprefix("local:")}
    if value.startswith("ds_"):
        return {"source": "upload", "id": value}
    name, _, file = value.removeprefix("hub:").partition(":")
    return {"source": "hub", "id": name, "file": file or None}


Dataset = Annotated[
    DatasetRef,
    BeforeValidator(_named_dataset, json_schema_input_type=DatasetRef | Name),
    Field(description="a name such as `bundled/pydoc`, `ds_...` or `local:file`, or the full reference"),
]


class Calibration(Model):
    """What the quantizers see: `samples` windows of text, images, or sampling trajectories (from seeds, no dataset)."""

    dataset: Dataset = DatasetRef(source="bundled", id="bundled/pydoc", split="train")
    samples: int = Field(128, ge=1, le=8192)
    sequence_length: int | None = Field(
        None, ge=8, le=131072, description="tokens a window; null: the model's context, at most 2048"
    )
    seed: int = Field(0, ge=0, le=2**31 - 1)


class Evaluation(Model):
    """Perplexity on windows of text (docs/perplexity.md), accuracy on images, or samples against full precision's."""

    dataset: Dataset = DatasetRef(source="bundled", id="bundled/pydoc", split="test")
    samples: int | None = Field(None, ge=1, le=2**31 - 1, description="windows at most; null: the whole text")
    sequence_length: int | None = Field(None, ge=8, le=131072, description="null: as the calibration")
    metrics: tuple[Metric, ...] | None = Field(
        None,
        min_length=1,
        description="null: perplexity of a language model; top1, top5 and kl of a classifier; latent_mse, psnr, ssim "
        "and, with `features`, frechet of a diffusion pipeline. lpips and frechet_inception are measured where they "
        "are named, on a worker that has their weights",
    )
    baselines: tuple[Literal["fp", "rtn"], ...] = ("fp", "rtn")
    allow_overlap: bool = Field(False, description="true: evaluate though calibration saw the same text")
    features: ModelRef | None = Field(
        None,
        description="diffusion: the classifier whose last class token spans the space of the Frechet distance; "
        "null: none, of bundled/ddpm-tiny bundled/vit-tiny",
    )


class Accept(Model):
    """A quality gate: a job that misses it ends as `rejected`; its files can still be read."""

    perplexity_increase_max: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="of quantized over full precision, relative: 0.1 is ten per cent",
    )
    accuracy_drop_max: float | None = Field(
        None, ge=0, le=1, description="of top-1 accuracy below full precision, absolute: 0.01 is one point"
    )


class Limits(Model):
    """How long a job may wait, run, and run without progress."""

    queue_s: int = Field(7 * 86400, ge=1, le=30 * 86400)
    run_s: int = Field(24 * 3600, ge=1, le=7 * 86400)
    no_progress_s: int = Field(1800, ge=1, le=86400)


class JobSpec(Model):
    """The full form of a job: what the server stores and a worker runs."""

    model: ModelRef
    recipe: tuple[Step, ...] = Field(min_length=1, max_length=8)
    calibration: Calibration = Calibration()
    evaluation: Evaluation | None = Field(Evaluation(), description="null: no evaluation")
    sampling: Sampling | None = Field(None, description="diffusion pipelines only; null: the defaults")
    format: Format = "auto"
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: what the worker was started for"
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the forwards; auto: bfloat16 products where the processor has them"
    )
    accept: Accept = Accept()
    limits: Limits = Limits()
    labels: dict[Label, Label] = Field({}, max_length=32)

    @property
    def training_step(self) -> TrainingStep | None:
        """The step of a job that trains; it is the only one then."""
        return next((step for step in self.recipe if isinstance(step, TrainingStep)), None)

    @property
    def reads_weights(self) -> bool:
        """Whether the checkpoint's weights are looked at: not if they are drawn anew."""
        return self.training_step is None or self.training_step.init != "random"

    @property
    def weight_step(self) -> WeightStep:
        """The one step that quantizes the weights; a job that trains has none."""
        return next(step for step in self.recipe if isinstance(step, WeightStep))

    @property
    def compensation(self) -> BiasCompensationStep | None:
        return next((step for step in self.recipe if isinstance(step, BiasCompensationStep)), None)

    @property
    def activation_step(self) -> ActivationStep | None:
        """The step that quantizes activations, if the recipe has one."""
        return next((step for step in self.recipe if isinstance(step, ActivationStep)), None)

    @property
    def softmax_bias(self) -> SoftmaxBiasStep | None:
        return next((step for step in self.recipe if isinstance(step, SoftmaxBiasStep)), None)

    @property
    def accuquant(self) -> AccuquantStep | None:
        return next((step for step in self.recipe if isinstance(step, AccuquantStep)), None)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_recipe(self.recipe)
        resolve_format(self.format, self)
        gates = ("perplexity_increase_max", "accuracy_drop_max")
        gate = next((name for name in gates if getattr(self.accept, name) is not None), None)
        if gate and (self.evaluation is None or "fp" not in self.evaluation.baselines):
            raise SpecError(
                f"accept.{gate}",
                "the gate compares with full precision: give an evaluation whose baselines hold `fp`",
            )
        return self


def resolve_format(wanted: Format, spec: JobSpec) -> Written:
    """The format that will be written. Raises SpecError if the one asked for cannot hold the result.

    `auto` is compressed-tensors where it is exact (symmetric weights, int-quantized for SmoothQuant), else
    quantry. The model may still move `auto` to quantry later, if the format has no place for its layers or biases.
    """
    if spec.training_step is not None:
        if wanted not in ("auto", "quantry"):
            raise SpecError("format", f"{wanted} has no place for quantized activations: use quantry or auto")
        return "quantry"
    weights, compensation, activation = spec.weight_step, spec.compensation, spec.activation_step
    per_position = compensation is not None and compensation.granularity == "position_channel"
    integer = isinstance(activation, SmoothquantStep) and weights.group_size is None and weights.bits == 8
    own = per_position or spec.softmax_bias is not None or (activation is not None and not integer)
    if wanted == "auto":
        return "compressed-tensors" if weights.symmetric and not own else "quantry"
    if wanted == "quantry":
        return wanted
    if wanted == "onnx":
        _check_onnx(spec)
        return wanted
    if own and not per_position:
        raise SpecError(
            "format",
            f"{wanted} has no place for what this recipe does to activations (compressed-tensors: SmoothQuant with "
            "8-bit weights, one scale a row); use quantry or auto",
        )
    if activation is not None and wanted != "compressed-tensors":
        raise SpecError("format", f"{wanted} holds weights only; use compressed-tensors or quantry")
    if per_position:
        raise SpecError(
            "format", f"{wanted} has no place for a bias per position; use quantry, or granularity channel"
        )
    if wanted == "compressed-tensors" and not weights.symmetric:
        raise SpecError(
            "format",
            "packed asymmetric compressed-tensors do not load in transformers; use symmetric weights, gptq or quantry",
        )
    if wanted == "gptq" and weights.bits not in (2, 3, 4, 8):
        raise SpecError(
            "format",
            f"the GPTQ layout holds 2, 3, 4 or 8 bits, not {weights.bits}; use compressed-tensors or quantry",
        )
    if wanted == "gguf" and not (weights.symmetric and weights.group_size == 32 and weights.bits in (4, 8)):
        raise SpecError(
            "format",
            "GGUF Q4_0 and Q8_0 hold symmetric weights of 4 or 8 bits in groups of 32 exactly, nothing else",
        )
    return wanted


def _check_onnx(spec: JobSpec) -> None:
    """That ONNX has nodes for the recipe. Raises SpecError."""
    activation, softmax = spec.activation_step, spec.softmax_bias
    static = isinstance(activation, UniformStep) and activation.granularity == "tensor"
    if activation is not None and not static:
        raise SpecError(
            "format",
            f"ONNX has no nodes for the grids of `{activation.method}`: it holds weights and static uniform grids "
            "(`uniform` with granularity tensor); use quantry",
        )
    if (
        activation is None
        and softmax is not None
        and softmax.range == "max"
        and softmax.granularity == "head"
    ):
        raise SpecError(
            "format",
            "ONNX takes one scale for the softmax, not one a head: give granularity tensor or range unit",
        )


class MethodInfo(Model):
    """One entry of `GET /v1/methods`."""

    method: str
    title: str
    role: Literal["weights", "activations", "correction", "training"]
    families: tuple[str, ...]
    formats: tuple[str, ...]
    cost: Literal["none", "light", "medium", "heavy"]
    paper: str | None
    json_schema: dict[str, Any]


class MethodPage(Model):
    items: tuple[MethodInfo, ...]


class DatasetRead(Model):
    """An uploaded text or set of images: use its id as `{"source": "upload", "id": ...}`."""

    id: str
    name: str
    bytes: int
    sha256: str
    documents: int = Field(description="of a text; 0 of images")
    characters: int = Field(description="of a text; 0 of images")
    images: int | None = Field(None, description="null: a text")
    classes: int | None = Field(None, description="different labels; null: a text, or images without labels")
    created_at: datetime


class DatasetPage(Model):
    items: tuple[DatasetRead, ...]


class Problem(BaseModel):
    """RFC 9457 problem details."""

    model_config = ConfigDict(extra="allow")

    type: str = "about:blank"
    title: str
    status: int
    detail: str | None = None
    instance: str | None = None
    errors: list[dict[str, Any]] | None = None
