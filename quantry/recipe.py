"""The steps of a job: what each method can be told, and in which order they may stand."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from quantry.base import Bits, Model, SpecError
from quantry.training import FixedPointTrainingStep

Clip = Literal["none", "mse", "percentile"]
Level = Literal["module", "products", "attention", "mlp", "block", "model"]


EDGE_BITS = Field(
    None,
    description="diffusion: of the layers that read and write the latent; null: 8, elsewhere no such layers",
)


class WeightGrid(Model):
    """The grid of a weight-only step; shared by the steps that quantize weights."""

    bits: Bits
    group_size: int | None = Field(
        None, ge=2, le=65536, description="input columns that share a scale; null: one scale a row"
    )
    symmetric: bool = True
    clip: Clip = "none"
    percentile: float | None = Field(
        None,
        gt=50,
        le=100,
        description="clip percentile: each range ends at this percentile of its weights and starts at 100 minus "
        "it; null: 99.9",
    )

    @property
    def upper_percentile(self) -> float:
        """The percentile that a range ends at, with the default filled in."""
        return 99.9 if self.percentile is None else self.percentile


class RtnStep(WeightGrid):
    """Round to nearest: each weight to the nearest point of its grid, no calibration data."""

    method: Literal["rtn"] = "rtn"
    clip: Clip = Field(
        "none",
        description="none: min-max, the whole range; mse: shrink each range to the least squared error; "
        "percentile: leave the outermost weights out",
    )
    edge_bits: Bits | None = EDGE_BITS


class AdaroundStep(WeightGrid):
    """AdaRound (Nagel et al. 2020, arXiv:2004.10568) by blocks (BRECQ), over timesteps as Q-Diffusion does."""

    method: Literal["adaround"] = "adaround"
    symmetric: bool = False
    clip: Clip = "mse"
    edge_bits: Bits | None = EDGE_BITS
    iterations: int = Field(150, ge=0, le=100_000, description="of each block; 0: round to nearest")
    batch: int = Field(16, ge=1, le=1024, description="latents of an iteration")
    latents: int = Field(128, ge=1, le=65536, description="calibration latents, over all timesteps")
    learning_rate: float = Field(0.01, gt=0, le=1)


class SvdquantStep(WeightGrid):
    """SVDQuant (Li et al. 2025, arXiv:2411.05007): smoothing, a low-rank branch in 16 bits, the rest on a grid."""

    method: Literal["svdquant"] = "svdquant"
    group_size: int | None = Field(
        64, ge=2, le=65536, description="input columns that share a scale; null: one scale a row"
    )
    edge_bits: Bits | None = EDGE_BITS
    rank: int = Field(32, ge=1, le=1024, description="singular directions that stay in 16 bits")


class GptqStep(WeightGrid):
    """GPTQ (Frantar et al. 2022, arXiv:2210.17323), with the improvements that methods since then agree on."""

    method: Literal["gptq"] = "gptq"
    clip: Clip = Field(
        "mse",
        description="none: min-max, the whole range; mse: search each range, weighted by the Hessian; "
        "percentile: leave the outermost weights out",
    )
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
    levels: tuple[Level, ...] | None = Field(
        None,
        min_length=1,
        max_length=6,
        description="whose mean output error is taken away: every layer (module), the two products of attention "
        "(products; classifiers, position_channel and published), attention modules, feed-forward "
        "networks (mlp), blocks, the whole model (its logits; classifiers). A bias merges into the last layer of "
        "each. null: module, and block where targets is published and the block allows it",
    )

    @property
    def chosen_levels(self) -> tuple[Level, ...]:
        """The levels, with the default filled in."""
        return self.levels or (("module", "block") if self.targets == "published" else ("module",))


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
    edge_bits: Bits | None = EDGE_BITS


FISHER_DRAWS = 8  # labels drawn for an image, whose gradients make the Fisher information


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
    softmax: Literal["chosen", "log"] = Field(
        "chosen",
        description="grid of the probabilities P. log: powers of the square root of 2, as published, whose steps do "
        "not shrink with the bits; chosen: that or an evenly spaced one, by the squared error of P V",
    )


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
        description="ilp: group counts by layer, by integer programming within a budget of bit operations",
    )
    overhead_max: float | None = Field(
        None,
        gt=0,
        le=100,
        description="ilp: the budget, bit operations that grouping may add to an image, as a share of the products' "
        "own: 0.02 is two per cent; null: what `groups` everywhere would add",
    )
    bounds: Literal["widened", "mean"] = Field(
        "widened",
        description="where grids end. mean: as published, at the mean range of a group, which clips half of it; "
        "widened: between that and its outermost range, by squared error",
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


class AccuquantStep(Model):
    """AccuQuant (Lee et al. 2025, arXiv:2510.20348): train step sizes on where several denoising steps arrive."""

    method: Literal["accuquant"] = "accuquant"
    group: int = Field(5, ge=1, le=1000, description="M, consecutive steps that are simulated together")
    gradient: Literal["accuquant", "exact"] = Field(
        "accuquant", description="accuquant: as published, no gradient crosses a step; exact: it does"
    )
    per_group: bool = Field(True, description="a set of step sizes for each group; false: one for all steps")
    start: Literal["fp", "progressive"] = Field(
        "fp",
        description="groups start from full-precision latents, or from those that the groups before reach",
    )
    iterations: int = Field(20, ge=0, le=100_000, description="of each group")
    batch: int = Field(8, ge=1, le=1024, description="samples of an iteration")
    learning_rate: float = Field(0.01, gt=0, le=1, description="of the logarithm of a step size")


class NoiseCorrectionStep(Model):
    """Correct what the quantized network predicts by a gain and a shift for each step and channel."""

    method: Literal["noise_correction"] = "noise_correction"
    rule: Literal["ptqd", "tac"] = Field(
        "ptqd",
        description="ptqd: He et al. 2023, arXiv:2305.10657; tac: Yao et al. 2024, arXiv:2407.03917, its noise "
        "estimation reconstruction",
    )
    absorb: bool = Field(
        False,
        description="ptqd, with a sampler that adds noise: it adds less by the variance of what the correction leaves",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.absorb and self.rule != "ptqd":
            raise ValueError("`absorb` is a part of ptqd: leave it out, or set rule to `ptqd`")
        return self


WeightStep = RtnStep | GptqStep | AdaroundStep | SvdquantStep
ActivationStep = UniformStep | Ptq4vitStep | RepqStep | AdalogStep | IgqStep | SmoothquantStep
CorrectionStep = BiasCompensationStep | SoftmaxBiasStep | AccuquantStep | NoiseCorrectionStep
TrainingStep = FixedPointTrainingStep
Step = Annotated[WeightStep | ActivationStep | CorrectionStep | TrainingStep, Field(discriminator="method")]
WEIGHT_METHODS = ("rtn", "gptq", "adaround", "svdquant")
ACTIVATION_METHODS = ("uniform", "ptq4vit", "repq", "adalog", "igq", "smoothquant")
CORRECTION_METHODS = ("bias_compensation", "softmax_bias", "accuquant", "noise_correction")
TRAINING_METHODS = ("fixed_point_training",)


def check_recipe(recipe: tuple[Step, ...]) -> None:
    """One weight step, first; then at most one activation step; then each correction at most once. Or training, alone.

    Raises SpecError, also for a `percentile` that the step's clip would not look at.
    """
    trained = next((i for i, step in enumerate(recipe) if step.method in TRAINING_METHODS), None)
    if trained is not None and len(recipe) > 1:
        raise SpecError(
            f"recipe.{trained}",
            f"`{recipe[trained].method}` trains weights and activations on their grids by itself: it stands alone "
            "(`init` starts it from another job's result)",
        )
    if trained is not None:
        return
    if recipe[0].method not in WEIGHT_METHODS:
        raise SpecError(
            "recipe.0",
            f"`{recipe[0].method}` comes after the weights are quantized: put `rtn` or `gptq` before it, of diffusion "
            "pipelines `rtn` or `adaround`",
        )
    seen: list[str] = []
    for index, step in enumerate(recipe):
        path = f"recipe.{index}"
        if index and step.method in WEIGHT_METHODS:
            raise SpecError(path, f"a second weight step; `{recipe[0].method}` already quantizes the weights")
        if step.method in seen:
            raise SpecError(path, f"`{step.method}` stands twice")
        if isinstance(step, WeightGrid) and step.percentile is not None and step.clip != "percentile":
            raise SpecError(
                f"{path}.percentile", f"clip is `{step.clip}`: set clip to `percentile`, or leave this out"
            )
        if isinstance(step, IgqStep) and step.overhead_max is not None and step.allocation != "ilp":
            raise SpecError(
                f"{path}.overhead_max",
                f"allocation is `{step.allocation}`: set it to `ilp`, or leave this out",
            )
        if step.method in ACTIVATION_METHODS:
            before = next((name for name in seen if name not in WEIGHT_METHODS), None)
            if before in ACTIVATION_METHODS:
                raise SpecError(path, f"a second activation step; `{before}` already quantizes them")
            if before is not None:
                raise SpecError(path, f"`{before}` corrects what `{step.method}` does: put it after")
        if step.method == "accuquant" and not set(seen) & set(ACTIVATION_METHODS):
            raise SpecError(path, "`accuquant` trains the step sizes of activations: put `uniform` before it")
        if "noise_correction" in seen:
            raise SpecError(path, f"`noise_correction` corrects what `{step.method}` does: put it last")
        seen.append(step.method)


def dividing_group_sizes(columns: int) -> list[int]:
    """The usual group sizes that divide `columns`, largest first."""
    return [size for size in (1024, 512, 256, 128, 96, 64, 48, 32, 16, 8, 4, 2) if columns % size == 0]
