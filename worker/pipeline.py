"""run(): from a job's spec to a folder that loads: resolve, sweep, export, verify, report."""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from quantry.contract import JobSpec
from quantry.costs import estimate
from quantry.diffusion import INDEX
from quantry.jobs import Rejected, State, Succeeded
from quantry.planning import Plan
from quantry.quantizers.affine import QuantizedLayer
from quantry.quantizers.product_bias import ProductBias
from quantry.reports import BitOperations, Manifest, QualityRow, Report, SizeReport
from quantry.vision_costs import estimate_vision
from quantry.vision_planning import VisionPlan
from worker.activations import Activations, calibrate_activations
from worker.calibration.store import BlockStore
from worker.export import export
from worker.export.onnx_folder import write_onnx
from worker.export.quantry_format import Operands
from worker.export.verify import verify
from worker.export.vision import write_vision
from worker.methods.bops import count, model_products
from worker.models.causal_lm import CausalLM
from worker.models.source import check_folder, resolve
from worker.models.vision import VisionModel
from worker.outcome import clock, cost, environment, gate, whole_or_gone, write_papers
from worker.prepare import Prepared, prepare
from worker.progress import Progress
from worker.sweep import BlockSweep, SweepResult
from worker.workspace import Workspace

REFERENCE_IMAGES = 4
REFERENCE = (2, 64)  # windows and tokens of the batch on which the written checkpoint must agree


# Jobs that no block sweep runs: what they are, and the module whose `run` takes them, imported only then.
_OTHERS: tuple[tuple[Callable[[JobSpec, Path], bool], str], ...] = (
    (lambda spec, folder: (folder / INDEX).is_file(), "worker.diffusion.job"),
    (lambda spec, folder: spec.training_step is not None, "worker.training.job"),
)


def run(spec: JobSpec, workspace: Workspace, progress: Progress) -> Succeeded | Rejected:
    """Run one job. Raises QuantizationError and its kinds; what it wrote is then of no use to anybody."""
    began = clock()
    if workspace.threads is not None:
        torch.set_num_threads(workspace.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False  # a resumed job's bytes
    progress.stage(State.PREPARING, "resolving the model")
    folder = resolve(spec.model, workspace, weights=spec.reads_weights)
    for concerns, module in _OTHERS:
        if concerns(spec, folder):
            other: Succeeded | Rejected = importlib.import_module(module).run(spec, workspace, progress)
            return other
    job = prepare(spec, workspace, progress)
    store = BlockStore(workspace.checkpoints, job.fingerprint)
    found = calibrate_activations(job.model, job.spec, job.calibration, progress)
    sweep = BlockSweep(
        job.model,
        job.spec,
        store,
        progress,
        job.calibration,
        job.evaluation,
        job.judge,
        dressing=found.dressing,
        nearest=found.nearest,
        chosen=found.chosen,
        baseline=found.baseline,
    )
    result = sweep.run()
    with whole_or_gone(workspace.artifact):
        report, manifest = _package(job, sweep, result, found, workspace, progress, began)
    missed = gate(spec, report.quality)
    if missed:
        return Rejected(report=report, manifest=manifest, detail=missed)
    return Succeeded(report=report, manifest=manifest)


def _package(
    job: Prepared,
    sweep: BlockSweep,
    result: SweepResult,
    found: Activations,
    workspace: Workspace,
    progress: Progress,
    began: tuple[float, float],
) -> tuple[Report, Manifest]:
    """Write the checkpoint, prove that it loads, and put the report beside it."""
    progress.stage(State.PACKAGING, "writing the checkpoint", 0, 3)
    written = _export(job, sweep, workspace.artifact)
    progress.advance(1, 3, "reloading the checkpoint in a clean process")
    verification = _verify(job, sweep, workspace)
    progress.advance(2, 3, "writing the report")
    report = _report(job, sweep, result, found, workspace, verification, began)
    manifest = write_papers(workspace.artifact, report, source=job.folder, written=written)
    progress.advance(3, 3, "done")
    return report, manifest


def _export(job: Prepared, sweep: BlockSweep, target: Path) -> Manifest:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    layers = sweep.store.layers(job.model)
    if isinstance(job.model, VisionModel) and job.plan.format == "onnx":
        assert job.calibration is not None
        return write_onnx(
            job.folder,
            target,
            network=job.model.network,
            layers=layers,
            quantizers=sweep.dressing.quantizers,
            probability_bias=sweep.dressing.probability_bias,
            image_shape=job.calibration.shape[1:],
            recipe=job.spec.recipe,
            base_model=job.spec.model.id,
        )
    if isinstance(job.model, VisionModel):
        return write_vision(
            job.folder,
            target,
            network=job.model.network,
            layers=layers,
            quantizers=sweep.dressing.quantizers,
            probability_bias=sweep.dressing.probability_bias,
            recipe=job.spec.recipe,
            base_model=job.spec.model.id,
        )
    assert isinstance(job.plan, Plan)
    assert isinstance(job.model, CausalLM)
    assert job.plan.format != "onnx"
    return export(
        job.folder,
        target,
        format=job.plan.format,
        config=check_folder(job.folder),
        family=job.plan.family,
        layers=layers,
        kept=job.model.kept(),
        operands=Operands(sweep.dressing.quantizers, sweep.dressing.probability_bias),
        recipe=job.spec.recipe,
        base_model=job.spec.model.id,
    )


def _verify(job: Prepared, sweep: BlockSweep, workspace: Workspace) -> dict[str, float | str]:
    """Reload the artifact as a user would, in a clean process, and compare logits in float32."""
    name, inputs, reference = _reference(job, sweep)
    with tempfile.TemporaryDirectory(
        dir=workspace.artifact
    ) as folder:  # goes with the attempt, whatever happens
        path = Path(folder) / "reference.safetensors"
        safetensors.torch.save_file({name: inputs.contiguous(), "logits": reference.contiguous()}, path)
        return verify(workspace.artifact, job.plan.format, path, threads=workspace.threads)


def _reference(job: Prepared, sweep: BlockSweep) -> tuple[str, Tensor, Tensor]:
    """A batch, what transformers calls it, and the quantized network's logits for it in float32."""
    if isinstance(job.model, VisionModel):
        images = job.calibration if job.evaluation is None else job.evaluation
        assert images is not None
        chosen = images[:REFERENCE_IMAGES].cpu()
        with job.model.on(torch.device("cpu")):  # where it is reloaded: another device's rounding flips codes
            return "pixel_values", chosen, sweep.reference(chosen).float()
    assert isinstance(job.model, CausalLM)
    tokens = _reference_tokens(job)
    exact = CausalLM(
        job.folder, device=torch.device("cpu"), dtype=torch.float32, attention=job.model.attention_kind
    )
    exact.smooth_like(job.model)
    again = BlockSweep(
        exact, job.spec, sweep.store, sweep.progress, None, None, job.judge, dressing=sweep.dressing
    )
    return "input_ids", tokens, exact.head(tokens, again.reference(tokens)).float()


def _reference_tokens(job: Prepared) -> Tensor:
    """The batch that both sides compute: held-out windows where there are some, else whatever there is."""
    windows, length = REFERENCE
    tokens = job.calibration if job.evaluation is None else job.evaluation
    if tokens is None:
        assert isinstance(job.model, CausalLM)
        size = job.model.model.get_input_embeddings().num_embeddings
        return torch.randint(size, REFERENCE, generator=torch.Generator().manual_seed(0))
    if job.spec.compensation and job.spec.compensation.granularity == "position_channel":
        return tokens[:windows]  # biases per position need the window they were fitted for
    return tokens[:windows, :length]


def _report(
    job: Prepared,
    sweep: BlockSweep,
    result: SweepResult,
    found: Activations,
    workspace: Workspace,
    verification: dict[str, float | str],
    began: tuple[float, float],
) -> Report:
    ladder = [
        f"{layer.name}: damping raised to {layer.damping:g}"
        for layer in result.layers
        if _raised(job, layer.damping)
    ]
    return Report(
        job=workspace.job,
        spec=job.spec,
        quality=_quality(job, result),
        size=_size(job, sweep, workspace.artifact),
        layers=result.layers,
        blocks=result.blocks,
        operands=found.operands,
        bit_operations=_bit_operations(job, sweep),
        cost=cost(began, job.model.device, (result.cost.wall_s, result.cost.cpu_s)),
        estimate=_estimate(job),
        environment=environment(job.model.device, job.model.dtype),
        fingerprint=job.fingerprint,
        format=job.plan.format,
        warnings=(*job.warnings, *ladder),
        verification=verification,
    )


def _raised(job: Prepared, damping: float | None) -> bool:
    asked = getattr(job.spec.weight_step, "damping", None)
    return damping is not None and asked is not None and damping > asked * 1.0001


def _quality(job: Prepared, result: SweepResult) -> tuple[QualityRow, ...]:
    if job.evaluation is None:
        return ()
    samples = len(job.evaluation)
    return tuple(
        QualityRow(
            metric=metric,
            dataset=job.evaluation_name,
            samples=samples,
            fp=values.get("fp"),
            rtn=values.get("rtn"),
            quantized=values["quantized"],
        )
        for metric, values in result.quality.items()
    )


def _bit_operations(job: Prepared, sweep: BlockSweep) -> BitOperations | None:
    """Of one image through a classifier whose activations are quantized."""
    step = job.spec.activation_step
    if step is None or not isinstance(job.model, VisionModel):
        return None
    shape = None if job.calibration is None else tuple(job.calibration.shape[1:])
    found = count(
        model_products(job.model, shape),
        sweep.dressing.quantizers,
        weight_bits=job.spec.weight_step.bits,
        bits=step.bits,
        softmax_bits=getattr(step, "softmax_bits", None),
    )
    return BitOperations(base=found.base, overhead=found.overhead)


def _size(job: Prepared, sweep: BlockSweep, artifact: Path) -> SizeReport:
    bits = weights = added = 0
    for _, layer in sweep.store.layers(job.model):
        bias = _added_bytes(layer)
        bits += layer.weight.storage_bits() + 8 * bias
        weights += layer.weight.codes.numel()
        added += bias
    products = 4 * sum(
        q.bias.numel() for q in sweep.dressing.quantizers.values() if isinstance(q, ProductBias)
    )
    stored = sum(
        f.stat().st_size for f in artifact.iterdir() if f.suffix in (".safetensors", ".gguf", ".onnx")
    )
    return SizeReport(
        fp_bytes=job.plan.fp_bytes,
        quantized_bytes=stored,
        effective_bits=(bits + 8 * products) / weights,
        quantized_weights=weights,
        added_bias_bytes=added + products,
    )


def _added_bytes(layer: QuantizedLayer) -> int:
    """Bytes of the biases that the full-precision layer did not have."""
    channel = layer.bias.numel() * 4 if layer.added_bias and layer.bias is not None else 0
    return channel + (0 if layer.position_bias is None else layer.position_bias.numel() * 4)


def _estimate(job: Prepared) -> dict[str, object]:
    names = {"quantized_bytes", "effective_bits", "peak_memory_bytes", "seconds_low", "seconds_high"}
    cuda = job.model.device.type == "cuda"
    if isinstance(job.plan, VisionPlan):
        images = None if job.evaluation is None else len(job.evaluation)
        guess = estimate_vision(
            job.plan, threads=torch.get_num_threads(), cuda=cuda, evaluation_images=images
        )
        return guess.model_dump(mode="json", include=names)
    found = estimate(
        job.plan,
        threads=torch.get_num_threads(),
        cuda=cuda,
        evaluation_bytes=None if job.evaluation is None else 4 * job.evaluation.numel(),
    )
    return found.model_dump(mode="json", include=names)
