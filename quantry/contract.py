"""The job contract: what a user asks for, what a job says of itself, and what comes back.

Everything here is frozen, refuses unknown fields and needs no torch. Sizes are bytes, durations seconds,
times RFC 3339 UTC.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

Bits = Literal[2, 3, 4, 5, 6, 8]
Metric = Literal["perplexity", "top1", "top5", "kl"]
Format = Literal["auto", "compressed-tensors", "gptq", "gguf", "quantry"]
Label = Annotated[
    str, StringConstraints(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
]
Name = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+$")]


class Model(BaseModel):
    """Base of every record of the contract: immutable, strict about its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class SpecError(ValueError):
    """A request that no job can be made of. `path` names the field, as in `recipe.1.granularity`."""

    def __init__(self, path: str, detail: str) -> None:
        super().__init__(f"{path}: {detail}")
        self.path = path
        self.detail = detail


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
        name, _, revision = text.removeprefix("hub:").partition("@")
        return cls(source="hub", id=name, revision=revision or None)


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
        if text.startswith("bundled/"):
            return cls(source="bundled", id=text)
        if text.startswith("/"):
            return cls(source="local", id=text)
        if text.startswith("local:"):
            return cls(source="local", id=text.removeprefix("local:"))
        if text.startswith("ds_"):
            return cls(source="upload", id=text)
        name, _, file = text.removeprefix("hub:").partition(":")
        return cls(source="hub", id=name, file=file or None)


class WeightGrid(Model):
    """The grid of a weight-only step; shared by the steps that quantize weights."""

    bits: Bits
    group_size: int | None = Field(
        None, ge=8, le=65536, description="input columns that share a scale; null: one scale a row"
    )
    symmetric: bool = True


class RtnStep(WeightGrid):
    """Round to nearest: each weight to the nearest point of its grid, no calibration data."""

    method: Literal["rtn"] = "rtn"
    clip: Literal["none", "mse"] = Field(
        "none", description="mse: shrink each range to the least squared error"
    )


class GptqStep(WeightGrid):
    """GPTQ (Frantar et al. 2022, arXiv:2210.17323), with the improvements that methods since then agree on."""

    method: Literal["gptq"] = "gptq"
    clip: Literal["none", "mse"] = Field("mse", description="mse: search each range, weighted by the Hessian")
    act_order: Literal["static", "none"] = Field(
        "static", description="static: largest Hessian diagonal first"
    )
    target: Literal["asymmetric", "plain"] = Field(
        "asymmetric", description="asymmetric: reproduce the float layer's output from quantized inputs"
    )
    target_strength: float = Field(
        0.75,
        ge=0,
        le=1,
        description="share of the asymmetric shift that is applied; less than 1 overfits less",
    )
    damping: float = Field(0.01, gt=0, le=1, description="added to H, as a share of its mean diagonal")
    true_sequential: bool = Field(True, description="inside a block, later layers see earlier ones quantized")
    refinement: int | None = Field(
        None,
        ge=0,
        le=16,
        description="passes of scale refit and coordinate descent after the sweep; 0: classic GPTQ; "
        "null: 2 at 2 bits, else 1",
    )

    @property
    def passes(self) -> int:
        """Refinement passes, with the default filled in."""
        return self.refinement if self.refinement is not None else (2 if self.bits == 2 else 1)


class BiasCompensationStep(Model):
    """Bias compensation (Gong et al. 2024, arXiv:2404.01892): the mean output error moves into a bias."""

    method: Literal["bias_compensation"] = "bias_compensation"
    granularity: Literal["channel", "position_channel"] = Field(
        "channel", description="channel: merged, free; position_channel: as published, one bias per position"
    )
    targets: Literal["sequential", "published"] = Field(
        "sequential", description="sequential: inputs the quantized network sees; published: float inputs"
    )


class ActivationGrid(Model):
    """Shared by the steps that quantize activations: every linear input, Q, K, V and the softmax output."""

    bits: Bits
    softmax_bits: Bits | None = Field(None, description="of the attention probabilities; null: as `bits`")


class UniformStep(ActivationGrid):
    """Uniform asymmetric grids on every activation, static per tensor or dynamic per token."""

    method: Literal["uniform"] = "uniform"
    granularity: Literal["tensor", "token"] = Field(
        "tensor", description="tensor: one static scale; token: a scale for each token, found when it runs"
    )
    range: Literal["min_max", "percentile", "mse"] = Field(
        "min_max", description="tensor: how the static range is chosen"
    )


class Ptq4vitStep(ActivationGrid):
    """PTQ4ViT (Yuan et al. 2022, arXiv:2111.12293): twin uniform grids, scales searched under the Fisher metric."""

    method: Literal["ptq4vit"] = "ptq4vit"
    twin: Literal["nearest", "sum"] = Field(
        "nearest", description="nearest: the closest point of both grids; sum: the published form"
    )
    metric: Literal["fisher", "mse"] = Field(
        "fisher", description="fisher: squared gradients of sampled labels weight the output error"
    )
    candidates: int = Field(100, ge=2, le=1000, description="scales tried in a search")
    rounds: int = Field(3, ge=1, le=10, description="alternations between weight and input scales")


class RepqStep(ActivationGrid):
    """RepQ-ViT (Li et al. 2023, arXiv:2212.08254): channel scales after LayerNorm, folded into one; log softmax."""

    method: Literal["repq"] = "repq"


class AdalogStep(ActivationGrid):
    """AdaLog (Wu et al. 2024): logarithmic grids of searched base for softmax and shifted GELU outputs."""

    method: Literal["adalog"] = "adalog"
    candidates: int = Field(128, ge=2, le=1024, description="scales and bases tried in a search")
    rounds: int = Field(3, ge=1, le=10)


class IgqStep(ActivationGrid):
    """IGQ-ViT (Moon et al. 2024, arXiv:2404.00928): each image assigns its channels and rows to groups."""

    method: Literal["igq"] = "igq"
    groups: int = Field(
        8, ge=1, le=64, description="quantizers a layer: of all layers, or on average where allocated"
    )
    allocation: Literal["uniform", "ilp"] = Field(
        "uniform",
        description="ilp: group counts by layer, by integer programming under the same bit operations",
    )
    iterations: int = Field(30, ge=1, le=200, description="alternations of assignment and bounds")


class SmoothquantStep(Model):
    """SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): move outliers into the weights, then quantize both."""

    method: Literal["smoothquant"] = "smoothquant"
    bits: Bits = 8
    alpha: float = Field(0.5, ge=0, le=1, description="share of an outlier that moves into the weights")
    granularity: Literal["tensor", "token"] = Field(
        "token", description="token: dynamic scales; tensor: one static scale"
    )


class SoftmaxBiasStep(Model):
    """Softmax bias correction (Pandey et al. 2023, arXiv:2309.01729): give the probabilities their lost mass back."""

    method: Literal["softmax_bias"] = "softmax_bias"
    bits: Bits = Field(8, description="of the probabilities, where no activation step quantizes them")
    granularity: Literal["tensor", "head"] = "head"
    range: Literal["unit", "max"] = Field(
        "unit", description="unit: the grid covers [0, 1]; max: the largest probability seen"
    )


WeightStep = RtnStep | GptqStep
ActivationStep = UniformStep | Ptq4vitStep | RepqStep | AdalogStep | IgqStep | SmoothquantStep
CorrectionStep = BiasCompensationStep | SoftmaxBiasStep
Step = Annotated[WeightStep | ActivationStep | CorrectionStep, Field(discriminator="method")]
WEIGHT_METHODS = ("rtn", "gptq")
ACTIVATION_METHODS = ("uniform", "ptq4vit", "repq", "adalog", "igq", "smoothquant")
CORRECTION_METHODS = ("bias_compensation", "softmax_bias")


class Calibration(Model):
    """Windows of text that the quantizers see: `samples` windows of `sequence_length` tokens."""

    dataset: DatasetRef = DatasetRef(source="bundled", id="bundled/pydoc", split="train")
    samples: int = Field(128, ge=1, le=8192)
    sequence_length: int | None = Field(
        None, ge=8, le=131072, description="tokens a window; null: the model's context, at most 2048"
    )
    seed: int = Field(0, ge=0, le=2**31 - 1)


class Evaluation(Model):
    """Perplexity on non-overlapping windows of text; see docs/perplexity.md for the convention."""

    dataset: DatasetRef = DatasetRef(source="bundled", id="bundled/pydoc", split="test")
    samples: int | None = Field(None, ge=1, description="windows at most; null: the whole text")
    sequence_length: int | None = Field(None, ge=8, le=131072, description="null: as the calibration")
    metrics: tuple[Metric, ...] | None = Field(
        None,
        min_length=1,
        description="null: perplexity of a language model; top1, top5 and kl of a classifier",
    )
    baselines: tuple[Literal["fp", "rtn"], ...] = ("fp", "rtn")
    allow_overlap: bool = Field(False, description="true: evaluate though calibration saw the same text")


class Accept(Model):
    """A quality gate: a job that misses it ends as `rejected`; its files can still be read."""

    perplexity_increase_max: float | None = Field(
        None, gt=0, description="of quantized over full precision, relative: 0.1 is ten per cent"
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
    def weight_step(self) -> RtnStep | GptqStep:
        """The one step that quantizes the weights; the validator sees to it that there is one."""
        return next(step for step in self.recipe if isinstance(step, RtnStep | GptqStep))

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


class JobRequest(Model):
    """What `POST /v1/jobs` takes: the short form (`bits`, `method`, `correction`) or a full `recipe`."""

    model: Name | ModelRef = Field(description="a name such as `bundled/opt-tiny`, or the full reference")
    bits: Bits | None = None
    method: (
        Literal["rtn", "gptq", "uniform", "ptq4vit", "repq", "adalog", "igq", "smoothquant", "softmax_bias"]
        | None
    ) = Field(None, description="null: gptq; a method for activations brings its own weight step")
    correction: Literal["bias_compensation", "softmax_bias"] | None = None
    group_size: int | None = Field(None, ge=8, le=65536)
    symmetric: bool | None = None
    recipe: tuple[Step, ...] | None = Field(None, min_length=1, max_length=8)
    calibration: Calibration = Calibration()
    evaluation: Evaluation | None = Evaluation()
    format: Format = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    accept: Accept = Accept()
    limits: Limits = Limits()
    labels: dict[Label, Label] = Field({}, max_length=32)

    def resolve(self) -> JobSpec:
        """The full form. Raises SpecError, naming the field."""
        model = ModelRef.parse(self.model) if isinstance(self.model, str) else self.model
        short = {"bits", "method", "correction", "group_size", "symmetric"}
        rest = {name: getattr(self, name) for name in type(self).model_fields if name not in short}
        try:
            return JobSpec(**{**rest, "model": model, "recipe": self.recipe or self._recipe()})
        except ValidationError as error:
            raise _spec_error(error) from error

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        named = [
            n
            for n in ("bits", "method", "correction", "group_size", "symmetric")
            if n in self.model_fields_set
        ]
        if self.recipe is not None and named:
            raise ValueError(f"`recipe` is the full form: leave out {', '.join(f'`{n}`' for n in named)}")
        if self.recipe is None and self.bits is None:
            raise ValueError("give `bits` (with `method` and `correction`), or a `recipe`")
        return self

    def _recipe(self) -> tuple[Step, ...]:
        assert self.bits is not None  # _one_form
        method = self.method or "gptq"
        symmetric = self.symmetric if self.symmetric is not None else self.format != "gptq"
        grid: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size, "symmetric": symmetric}
        steps: list[Step] = []
        if method == "rtn":
            steps.append(RtnStep(**grid))
        elif method in ("ptq4vit", "repq", "adalog", "igq"):  # as published: no error feedback
            steps.append(RtnStep(**grid, clip="mse"))
        else:
            steps.append(GptqStep(**grid))
        if method in _SHORT_STEPS:
            steps.append(_SHORT_STEPS[method](bits=self.bits))
        if self.correction and self.correction != method:
            chosen = BiasCompensationStep if self.correction == "bias_compensation" else SoftmaxBiasStep
            steps.append(chosen())
        return tuple(steps)


_SHORT_STEPS: dict[str, Callable[..., Step]] = {
    "uniform": UniformStep,
    "ptq4vit": Ptq4vitStep,
    "repq": RepqStep,
    "adalog": AdalogStep,
    "igq": IgqStep,
    "smoothquant": SmoothquantStep,
    "softmax_bias": lambda bits: SoftmaxBiasStep(),
}


def _spec_error(error: ValidationError) -> SpecError:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, SpecError):
        return cause
    path = ".".join(str(part) for part in first["loc"]) or "body"
    return SpecError(path, first["msg"])


def check_recipe(recipe: tuple[Step, ...]) -> None:
    """One weight step, first; then at most one activation step; then each correction at most once.

    Raises SpecError.
    """
    if recipe[0].method not in WEIGHT_METHODS:
        raise SpecError(
            "recipe.0",
            f"`{recipe[0].method}` comes after the weights are quantized: put `rtn` or `gptq` before it",
        )
    seen: list[str] = []
    for index, step in enumerate(recipe):
        path = f"recipe.{index}"
        if index and step.method in WEIGHT_METHODS:
            raise SpecError(path, f"a second weight step; `{recipe[0].method}` already quantizes the weights")
        if step.method in seen:
            raise SpecError(path, f"`{step.method}` stands twice")
        if step.method in ACTIVATION_METHODS:
            before = next((name for name in seen if name not in WEIGHT_METHODS), None)
            if before in ACTIVATION_METHODS:
                raise SpecError(path, f"a second activation step; `{before}` already quantizes them")
            if before is not None:
                raise SpecError(path, f"`{before}` corrects what `{step.method}` does: put it after")
        seen.append(step.method)


def resolve_format(wanted: Format, spec: JobSpec) -> Literal["compressed-tensors", "gptq", "gguf", "quantry"]:
    """The format that will be written. Raises SpecError if the one asked for cannot hold the result.

    `auto` is compressed-tensors where it is exact (symmetric weights, int-quantized for SmoothQuant), else
    quantry. The model may still move `auto` to quantry later, if the format has no place for its layers or biases.
    """
    weights, compensation, activation = spec.weight_step, spec.compensation, spec.activation_step
    per_position = compensation is not None and compensation.granularity == "position_channel"
    integer = isinstance(activation, SmoothquantStep) and weights.group_size is None and weights.bits == 8
    own = per_position or spec.softmax_bias is not None or (activation is not None and not integer)
    if wanted == "auto":
        return "compressed-tensors" if weights.symmetric and not own else "quantry"
    if wanted == "quantry":
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


def dividing_group_sizes(columns: int) -> list[int]:
    """The usual group sizes that divide `columns`, largest first."""
    return [size for size in (1024, 512, 256, 128, 96, 64, 48, 32, 16, 8) if columns % size == 0]


class State(StrEnum):
    """Where a job is. The moves between them are one table: `MOVES`."""

    QUEUED = "queued"
    PREPARING = "preparing"
    CALIBRATING = "calibrating"
    QUANTIZING = "quantizing"
    CORRECTING = "correcting"
    EVALUATING = "evaluating"
    PACKAGING = "packaging"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    EXPIRED = "expired"


RUNNING = (
    State.PREPARING,
    State.CALIBRATING,
    State.QUANTIZING,
    State.CORRECTING,
    State.EVALUATING,
    State.PACKAGING,
)
FINISHED = (State.SUCCEEDED, State.FAILED, State.CANCELLED, State.REJECTED, State.EXPIRED)


def _moves() -> dict[State, frozenset[State]]:
    ends = {State.SUCCEEDED, State.REJECTED, State.FAILED, State.CANCELLING, State.CANCELLED, State.QUEUED}
    table: dict[State, frozenset[State]] = {
        State.QUEUED: frozenset({State.PREPARING, State.CANCELLED, State.EXPIRED, State.FAILED}),
        State.CANCELLING: frozenset({State.CANCELLED, State.FAILED}),
    }
    for index, state in enumerate(RUNNING):  # forward only; QUEUED again when a worker was lost
        table[state] = frozenset(ends | set(RUNNING[index + 1 :]))
    retry = frozenset({State.QUEUED})
    table.update({State.FAILED: retry, State.CANCELLED: retry, State.EXPIRED: retry, State.REJECTED: retry})
    table[State.SUCCEEDED] = frozenset()
    return table


MOVES: dict[State, frozenset[State]] = _moves()


class Progress(Model):
    """How far the present stage is, and how long it will still take at its present pace."""

    done: int = 0
    total: int = 0
    eta_s: float | None = None


class JobError(Model):
    """Why a job did not succeed. `type` is stable and short, such as `worker-lost` or `out-of-memory`."""

    type: str
    title: str
    detail: str
    retryable: bool = False


class QualityRow(Model):
    """One metric for full precision, round-to-nearest at the same bits, and the job's result."""

    metric: str
    dataset: str
    samples: int
    fp: float | None = None
    rtn: float | None = None
    quantized: float | None = None


class JobRead(Model):
    """A job as the API shows it."""

    id: str
    state: State
    stage: str | None = None
    progress: Progress = Progress()
    attempt: int = 0
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    spec: JobSpec
    labels: dict[str, str] = {}
    error: JobError | None = None
    quality: tuple[QualityRow, ...] | None = None
    links: dict[str, str] = {}


class JobPage(Model):
    """One page of a list; `next` is the cursor of the following page."""

    items: tuple[JobRead, ...]
    next: str | None = None


class Event(Model):
    """One thing that happened to a job. `kind`: state, progress, log, warning, block, result."""

    id: int
    at: datetime
    kind: str
    data: dict[str, Any]


class EventPage(Model):
    items: tuple[Event, ...]


class Attempt(Model):
    """One run of a job by a worker. `outcome`: running, succeeded, failed, cancelled, rejected, lost."""

    number: int
    worker: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    outcome: str | None = None
    detail: str | None = None


class AttemptPage(Model):
    items: tuple[Attempt, ...]


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
    """`manifest.json`: every file of the artifact with its digest (but the manifest itself)."""

    job: str | None
    format: str
    loader: Loader
    files: tuple[FileEntry, ...]


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
    cost: CostReport
    estimate: dict[str, Any] = {}
    environment: dict[str, str]
    fingerprint: str
    format: str
    warnings: tuple[str, ...] = ()
    verification: dict[str, float | str] = {}


class Succeeded(Model):
    outcome: Literal["succeeded"] = "succeeded"
    report: Report
    manifest: Manifest


class Rejected(Model):
    """The artifact is whole, but it missed the quality gate that the job set."""

    outcome: Literal["rejected"] = "rejected"
    report: Report
    manifest: Manifest
    detail: str


class Failed(Model):
    outcome: Literal["failed"] = "failed"
    error: JobError


class Cancelled(Model):
    outcome: Literal["cancelled"] = "cancelled"


Outcome = Annotated[Succeeded | Rejected | Failed | Cancelled, Field(discriminator="outcome")]


class MethodInfo(Model):
    """One entry of `GET /v1/methods`."""

    method: str
    title: str
    role: Literal["weights", "activations", "correction"]
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
