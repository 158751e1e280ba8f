"""The options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from quantry import __version__

_RECIPE, _DATA, _MORE = "Recipe", "Data", "More"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantry {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end."),
]


class Method(StrEnum):
    RTN = "rtn"
    GPTQ = "gptq"
    ADAROUND = "adaround"
    UNIFORM = "uniform"
    PTQ4VIT = "ptq4vit"
    REPQ = "repq"
    ADALOG = "adalog"
    IGQ = "igq"
    SMOOTHQUANT = "smoothquant"
    SOFTMAX_BIAS = "softmax_bias"
    ACCUQUANT = "accuquant"
    FIXED_POINT_TRAINING = "fixed_point_training"


class Correction(StrEnum):
    BIAS_COMPENSATION = "bias_compensation"
    SOFTMAX_BIAS = "softmax_bias"
    NOISE_CORRECTION = "noise_correction"


class FormatName(StrEnum):
    AUTO = "auto"
    COMPRESSED_TENSORS = "compressed-tensors"
    GPTQ = "gptq"
    GGUF = "gguf"
    QUANTRY = "quantry"
    ONNX = "onnx"


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job, job_...")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]", help="bundled/NAME, OWNER/NAME\\[@REVISION] of the hub, or local:FOLDER."
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        help="2, 3, 4, 5, 6 or 8; --spec takes a recipe with other bits for activations.",
        rich_help_panel=_RECIPE,
    ),
]
MethodOption = Annotated[
    Method | None,
    typer.Option(
        "--method",
        help="How weights are rounded, default gptq; or a method for activations, which quantizes both to "
        "--bits. The command methods lists what works on which models.",
        rich_help_panel=_RECIPE,
    ),
]
CorrectionOption = Annotated[
    Correction | None,
    typer.Option("--correction", help="What is corrected after it.", rich_help_panel=_RECIPE),
]
GroupSize = Annotated[
    int | None,
    typer.Option(help="Input columns that share a scale; default: one scale a row.", rich_help_panel=_RECIPE),
]
Asymmetric = Annotated[
    bool, typer.Option("--asymmetric", help="Grids with a zero point.", rich_help_panel=_RECIPE)
]
FormatOption = Annotated[
    FormatName | None,
    typer.Option("--format", help="Of the checkpoint; default auto.", rich_help_panel=_RECIPE),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="DATASET",
        help="Text or images to calibrate on: a file here, bundled/NAME, ds_..., local:FILE or hub:NAME:FILE.",
        rich_help_panel=_DATA,
    ),
]
Samples = Annotated[
    int | None, typer.Option(help="Windows of calibration text, or images.", rich_help_panel=_DATA)
]
SequenceLength = Annotated[
    int | None, typer.Option("--seq-len", help="Tokens in a window.", rich_help_panel=_DATA)
]
Seed = Annotated[int | None, typer.Option(help="Which windows or images are drawn.", rich_help_panel=_DATA)]
Evaluation = Annotated[
    str | None,
    typer.Option(
        metavar="DATASET",
        help="Text to measure perplexity on, or labelled images for accuracy.",
        rich_help_panel=_DATA,
    ),
]
Evaluate = Annotated[
    bool, typer.Option("--evaluate/--no-evaluate", help="Measure the quality.", rich_help_panel=_DATA)
]
AcceptIncrease = Annotated[
    float | None,
    typer.Option(
        help="Reject the result if perplexity grows by more than this share: 0.1 is ten per cent.",
        rich_help_panel=_DATA,
    ),
]
AcceptAccuracyDrop = Annotated[
    float | None,
    typer.Option(
        help="Reject the result if top-1 accuracy falls by more than this: 0.01 is one point.",
        rich_help_panel=_DATA,
    ),
]
DeviceOption = Annotated[Device | None, typer.Option("--device", rich_help_panel=_MORE)]
Labels = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="NAME=VALUE", help="May be repeated.", rich_help_panel=_MORE),
]
SpecFile = Annotated[
    str | None,
    typer.Option("--spec", metavar="FILE", help="The request as JSON; - for stdin.", rich_help_panel=_MORE),
]
Key = Annotated[
    str | None,
    typer.Option("--idempotency-key", help="Submits with the same key are one job.", rich_help_panel=_MORE),
]
Watch = Annotated[bool, typer.Option("--watch", help="Follow the job to its end.", rich_help_panel=_MORE)]
DownloadTo = Annotated[
    Path | None,
    typer.Option(
        "--download", metavar="DIR", help="Follow the job, then download it.", rich_help_panel=_MORE
    ),
]
Timeout = Annotated[
    float | None, typer.Option(metavar="SECONDS", help="Stop following after so long; the job goes on.")
]
