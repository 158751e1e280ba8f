"""run(): from a job's spec to a folder that loads: prepare, train, evaluate, export, verify, report."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from quantry.contract import JobSpec
from quantry.jobs import Rejected, State, Succeeded
from quantry.reports import EpochReport, QualityRow, Report
from quantry.training_costs import estimate_training
from worker.errors import TrainingDiverged
from worker.metrics.quality import classifier_figures
from worker.outcome import clock, cost, environment, gate, whole_or_gone, write_papers
from worker.progress import Progress
from worker.training.artifact import size_report, training_report, verified, write_artifact
from worker.training.checkpoints import Checkpoints
from worker.training.data import batch_count
from worker.training.layers import use_fixed_point
from worker.training.network import take_ranges
from worker.training.prepare import PreparedTraining, prepare_training
from worker.training.trainer import Trainer
from worker.workspace import Workspace


def run(spec: JobSpec, workspace: Workspace, progress: Progress) -> Succeeded | Rejected:
    """Run one job. Raises QuantizationError and its kinds; finished epochs are kept for the next attempt."""
    began = clock()
    job = prepare_training(spec, workspace, progress)
    training = TrainingRun(job, workspace, progress)
    before = clock()
    trainer, kept_epoch, stopped = training.quantized()
    own = (clock()[0] - before[0], clock()[1] - before[1])
    training.warn_of_inactive(trainer)
    baseline = None
    if training.compares and training.diverged is None:
        baseline = training.full_precision(len(trainer.curve))
    quality = _evaluate(job, trainer, baseline, progress)
    progress.stage(State.PACKAGING, "writing the checkpoint", 0, 3)
    with whole_or_gone(workspace.artifact):
        shutil.rmtree(workspace.artifact, ignore_errors=True)
        workspace.artifact.mkdir(parents=True)
        written = write_artifact(job, trainer, workspace.artifact)
        progress.advance(1, 3, "reloading the checkpoint in a clean process")
        verification = verified(job, trainer, workspace)
        progress.advance(2, 3, "writing the report")
        report = Report(
            job=workspace.job,
            spec=job.spec,
            quality=quality,
            size=size_report(job, trainer, workspace.artifact),
            layers=(),
            blocks=(),
            training=training_report(job, trainer, baseline, kept_epoch, stopped),
            cost=cost(began, job.device, own),
            estimate=_estimate(job),
            environment=environment(job.device, torch.float32),
            fingerprint=job.fingerprint,
            format=job.plan.format,
            warnings=tuple(job.warnings),
            verification=verification,
        )
        manifest = write_papers(workspace.artifact, report, source=job.folder, written=written)
    progress.advance(3, 3, "done")
    if training.diverged is not None:
        detail = f"{training.diverged}; the files are the network in fixed point after epoch {kept_epoch}"
        return Rejected(report=report, manifest=manifest, reason="training-diverged", detail=detail)
    missed = gate(spec, report.quality)
    if missed:
        return Rejected(report=report, manifest=manifest, detail=missed)
    return Succeeded(report=report, manifest=manifest)


class TrainingRun:
    """The trainings of one job: in fixed point, and in full precision to compare with, one after the other.

    diverged: what ended the training in fixed point after at least one epoch, or that in full precision.
    """

    def __init__(self, job: PreparedTraining, workspace: Workspace, progress: Progress) -> None:
        self._job, self._workspace, self._progress = job, workspace, progress
        evaluation = job.spec.evaluation
        self.compares = evaluation is not None and "fp" in evaluation.baselines
        self._steps = batch_count(len(job.images), job.step.batch_size)
        self._total = self._steps * job.step.epochs * (1 + self.compares)
        self.diverged: str | None = None

    def quantized(self) -> tuple[Trainer, int, str | None]:
        """The network trained in fixed point, the epoch it is of, and why it stopped early, if it did."""
        job = self._job
        network, packed = job.network()
        use_fixed_point(network, tuple(layer.name for layer in job.plan.quantized), job.step)
        if packed is not None:
            take_ranges(network, packed)
        return self._train(self._trainer(network), "quantized", job.step.epochs)

    def warn_of_inactive(self, trainer: Trainer) -> None:
        """Name the layers in which the rule was inactive though the plan, which knew less of the images, said not."""
        late = [
            name
            for name, gradient in trainer.gradients.items()
            if gradient.interval == "large_gradient"
            and not gradient.active
            and name not in self._job.plan.inactive
        ]
        if late:
            self._warn(
                f"the large-gradient interval was inactive, for want of gradients, in {', '.join(late)} too"
            )

    def full_precision(self, epochs: int) -> Trainer | None:
        """The same training without quantizers, for as many epochs; None if it diverged.

        It starts from the checkpoint, also where the other starts from what a job has made of it.
        """
        network = self._job.reference()
        try:
            return self._train(self._trainer(network), "fp", epochs)[0]
        except TrainingDiverged as error:
            self._diverged(
                f"the training in full precision that the result is compared with: {error}; "
                "`evaluation.baselines: []` leaves it out"
            )
            return None

    def _trainer(self, network: object) -> Trainer:
        job = self._job
        return Trainer(
            network, job.step, job.spec.calibration.seed, job.device, lambda done: None, self._warn
        )

    def _diverged(self, text: str) -> None:
        self.diverged = text
        self._warn(f"training diverged: {text}")

    def _warn(self, text: str) -> None:
        self._job.warnings.append(text)
        self._progress.event("warning", {"message": text})

    def _train(self, trainer: Trainer, name: str, epochs: int) -> tuple[Trainer, int, str | None]:
        job, quantizes = self._job, name == "quantized"
        store = Checkpoints(self._workspace.checkpoints / name, job.fingerprint)
        store.resume(trainer)
        self._progress.stage(State.QUANTIZING, "training", self._done(trainer, quantizes), self._total)
        stopped = None
        best = _best_epoch(trainer.curve)
        while len(trainer.curve) < epochs:
            stopped = self._patience_ends(trainer.curve, best) if quantizes else None
            if stopped:
                break
            trainer.tell = self._teller(trainer, quantizes)
            try:
                report = trainer.epoch(job.images, job.held)
            except TrainingDiverged as error:
                if not (quantizes and store.resume(trainer)):
                    raise
                stopped = str(error)
                self._diverged(stopped)
                break
            best = _best_epoch(trainer.curve)
            if best == len(trainer.curve):
                store.keep_best(trainer)
            store.save(trainer)
            self._progress.event("epoch", {"network": name, **report.model_dump(mode="json")})
        if job.step.patience is None:
            return trainer, len(trainer.curve), stopped
        store.take_best(trainer)
        return trainer, best, stopped

    def _done(self, trainer: Trainer, quantizes: bool) -> int:
        """Steps of the whole job behind us; the full-precision run comes last."""
        before = 0 if quantizes else self._total - self._steps * self._job.step.epochs
        return before + len(trainer.curve) * self._steps

    def _teller(self, trainer: Trainer, quantizes: bool) -> Callable[[int], None]:
        what = "training in fixed point" if quantizes else "training in full precision"
        before, epoch = self._done(trainer, quantizes), len(trainer.curve) + 1
        stage = f"{what}: epoch {epoch} of {self._job.step.epochs}"

        def tell(done: int) -> None:
            self._progress.advance(before + done, self._total, stage)

        return tell

    def _patience_ends(self, curve: list[EpochReport], best: int) -> str | None:
        patience = self._job.step.patience
        if patience is None or len(curve) - best < patience:
            return None
        return f"no lower validation loss since epoch {best}"


def _best_epoch(curve: list[EpochReport]) -> int:
    """The number of the epoch of least validation loss, the first of several; 0 where none has one."""
    losses = [epoch.validation_loss for epoch in curve if epoch.validation_loss is not None]
    return losses.index(min(losses)) + 1 if losses else 0


def _evaluate(
    job: PreparedTraining, trainer: Trainer, baseline: Trainer | None, progress: Progress
) -> tuple[QualityRow, ...]:
    """Accuracy of both networks on the evaluation images."""
    images, evaluation = job.evaluation, job.spec.evaluation
    if images is None or evaluation is None:
        return ()
    progress.stage(State.EVALUATING, "evaluating", 0, 1)
    networks = {"quantized": trainer} | ({} if baseline is None else {"fp": baseline})
    logits = {name: _logits(one, images) for name, one in networks.items()}
    figures = classifier_figures(logits, job.labels, evaluation.metrics or ())
    progress.advance(1, 1)
    return tuple(
        QualityRow(
            metric=metric,
            dataset=job.evaluation_name,
            samples=len(images),
            fp=values.get("fp"),
            quantized=values["quantized"],
        )
        for metric, values in figures.items()
    )


def _logits(trainer: Trainer, images: Tensor) -> Tensor:
    return trainer.logits(lambda places: images[places], len(images))


def _estimate(job: PreparedTraining) -> dict[str, object]:
    names = {"quantized_bytes", "effective_bits", "peak_memory_bytes", "seconds_low", "seconds_high"}
    guess = estimate_training(
        job.plan,
        threads=torch.get_num_threads(),
        cuda=job.device.type == "cuda",
        training_images=len(job.images),
        evaluation_images=None if job.evaluation is None else len(job.evaluation),
    )
    return guess.model_dump(mode="json", include=names)
