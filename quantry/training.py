"""The step of the contract that trains a network in fixed point. No torch.

Defaults are the published ones of Kim et al. 2024 (arXiv:2407.12637, its released code) where there are any; what they
did not publish is marked as ours in docs/training.md.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from quantry.base import Model

TrainingBits = Annotated[int, Field(ge=2, le=8)]
Interval = Literal["large_gradient", "min_max", "fixed", "mse"]
Augmentation = Literal["none", "crop", "flip_crop"]
Schedule = Literal["step", "cosine", "constant"]
Init = Annotated[str, StringConstraints(pattern=r"^(model|random|job_[0-9a-f-]{36})$")]


class GradientGrid(Model):
    """The grid of the gradients: their bits, and the rule that finds how wide it is."""

    bits: TrainingBits | None = Field(None, description="null: as the step's `bits`")
    interval: Interval = Field(
        "large_gradient",
        description="large_gradient: as published, protects the largest gradients; min_max: the whole range; fixed: "
        "the share `gamma` of it; mse: least squared error over all gradients, searched every 100 iterations",
    )
    gamma: float = Field(
        1.0, ge=0.001, le=1, description="fixed: half-width of the grid over the largest gradient"
    )
    alpha: float = Field(1e-3, gt=0, le=1, description="share of the gradients that count as large")
    beta: float = Field(1e-3, ge=1e-5, le=0.1, description="step of the interval at each iteration")
    warm_start: bool = Field(
        True, description="large_gradient: the first batch finds the first interval and trains nothing"
    )


class FixedPointTrainingStep(Model):
    """Fixed-point training (Kim et al. 2024, arXiv:2407.12637): low-bit weights, activations and gradients.

    It trains the network from where `init` says, on `calibration.dataset`, with `calibration.seed`, in float32 without
    mixed precision; rounding is simulated.
    """

    method: Literal["fixed_point_training"] = "fixed_point_training"
    bits: TrainingBits = Field(
        description="of weights, and of activations and gradients unless they say otherwise"
    )
    activation_bits: TrainingBits | None = Field(None, description="null: as `bits`")
    gradient: GradientGrid | None = Field(
        GradientGrid(), description="null: gradients stay in full precision"
    )
    init: Init = Field(
        "model",
        description="model: the checkpoint's weights; random: drawn anew by `calibration.seed`; a job id: the artifact "
        "of that job of yours, on the same model",
    )
    samples: int | None = Field(
        None, ge=1, description="training images drawn; null: all of calibration.dataset"
    )
    epochs: int = Field(160, ge=1, le=10_000)
    batch_size: int = Field(128, ge=1, le=65_536)
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=100,
        description="of SGD; null: 0.1 from random weights, 0.05 for MobileNetV2, else 0.01",
    )
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float | None = Field(None, ge=0, le=1, description="null: 4e-5 for MobileNetV2, else 1e-4")
    schedule: Schedule | None = Field(None, description="null: cosine for MobileNetV2, else step")
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.5, 0.75),
        max_length=16,
        description="schedule step: shares of the epochs after which the rate falls",
    )
    decay: float = Field(0.1, gt=0, le=1, description="schedule step: what the rate is multiplied by")
    range_learning_rate: float = Field(
        1e-5, ge=0, le=1, description="of Adam on the ranges of the forward grids"
    )
    augmentation: Augmentation | None = Field(
        None, description="null: flip_crop of colour images, crop of grey ones; a crop pads by an eighth"
    )
    patience: int | None = Field(
        None, ge=1, description="stop after so many epochs without a lower validation loss; null: never"
    )
    validation: float = Field(
        0.1, gt=0, lt=1, description="patience: share of the training images held out to judge epochs by"
    )
