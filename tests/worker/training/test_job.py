"""Training jobs from request to artifact, on every family; what they report; how they go on after a kill."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from factories import write_processor
from training_jobs import artifact, train, trained, training

import quantry
from quantry.jobs import Rejected, Succeeded
from worker.errors import DatasetError, ModelError, RecipeError, TrainingDiverged
from worker.progress import Progress
from worker.training.job import TrainingRun
from worker.training.network import dense_copy
from worker.training.prepare import prepare_training
from worker.training.trainer import Trainer
from worker.workspace import JobInput, Workspace


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "vit", "dinov2", "swin"])
def test_every_family_trains_and_its_artifact_computes_the_same(name: str, workspace: Workspace) -> None:
    request = training(workspace, name, step={"epochs": 1, "learning_rate": 0.01})
    job, trainer = trained(workspace, request)
    model = artifact(job, trainer, workspace.artifact)
    images = job.evaluation
    assert images is not None
    with torch.no_grad():
        logits = model(pixel_values=images).logits
    torch.testing.assert_close(
        logits, trainer.logits(lambda part: images[part], len(images)), atol=1e-5, rtol=1e-5
    )
    assert set(trainer.curve[0].gamma) == {layer.name for layer in job.plan.quantized}


def test_a_network_of_four_bits_learns_and_its_artifact_is_proved(workspace: Workspace) -> None:
    written = io.StringIO()
    outcome = train(workspace, training(workspace, step={"epochs": 6, "learning_rate": 0.05}), written)
    assert isinstance(outcome, Succeeded)
    report, found = outcome.report, outcome.report.training
    top1 = next(row for row in report.quality if row.metric == "top1")
    assert top1.fp is not None
    assert top1.quantized is not None
    assert min(top1.fp, top1.quantized) > 0.6  # of five classes
    assert (top1.samples, top1.rtn) == (20, None)
    assert found is not None
    assert found.epochs[-1].loss < found.epochs[0].loss
    assert len(found.epochs) == len(found.fp_epochs) == 6
    assert not found.fp_epochs[0].gamma
    assert {layer.name for layer in found.kept}.isdisjoint(found.epochs[0].gamma)
    assert all(layer.active for layer in found.layers)
    assert float(report.verification["relative_difference"]) < 1e-5
    packed = quantry.load(workspace.artifact).get_submodule("resnet.stages.0.0.layer.0.convolution")
    assert packed.input_quantizer.describe() == {"kind": "fixed_point", "bits": 4, "signed": False}
    assert packed.weight.unique().numel() <= 15
    page = (workspace.artifact / "report.html").read_text()
    assert "Training" in page
    assert all(layer.name in page for layer in (*found.layers, *found.kept))
    check_messages(written.getvalue())


def check_messages(written: str) -> None:
    """Every epoch of both networks is an event, and progress reaches its end."""
    messages = [json.loads(line) for line in written.splitlines()]
    epochs = [m["data"] for m in messages if m["type"] == "event" and m["kind"] == "epoch"]
    assert [e["epoch"] for e in epochs] == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6]
    assert [e["network"] for e in epochs] == ["quantized"] * 6 + ["fp"] * 6
    assert all(0 < gamma <= 1 for gamma in epochs[5]["gamma"].values())
    assert epochs[5]["large_gradient_error"].keys() == epochs[5]["gamma"].keys()
    stages = [m for m in messages if m["type"] == "stage" and m["state"] == "quantizing"]
    assert (stages[-1]["done"], stages[-1]["total"]) == (72, 72)  # 180 images in batches of 30


def assert_same(first: Trainer, second: Trainer) -> None:
    one, other = first.network.state_dict(), second.network.state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    for epoch, again in zip(first.curve, second.curve, strict=True):
        assert epoch.model_copy(update={"seconds": 0}) == again.model_copy(update={"seconds": 0})


def fresh(workspace: Workspace, name: str, **changes: Any) -> Workspace:
    """A workspace for another job on the same models and data."""
    place = workspace.artifact.parent / name
    return workspace.model_copy(
        update={"artifact": place / "artifact", "checkpoints": place / "checkpoints", **changes}
    )


def test_a_killed_job_goes_on_with_the_same_curve_and_bytes(workspace: Workspace) -> None:
    step = {"epochs": 4, "augmentation": "flip_crop"}
    request = training(workspace, "mobilenet_v2", step=step, evaluation=None)  # with dropout
    _, whole = trained(workspace, request)
    killed = fresh(workspace, "killed")
    kill_after_first_epoch(request.resolve(), killed)
    assert len(list((killed.checkpoints / "quantized").glob("epoch-*"))) == 1
    written = io.StringIO()
    _, resumed = trained(killed, request, written)
    assert_same(whole, resumed)
    assert written.getvalue().count('"kind": "epoch"') < 4  # what was finished was not trained again
    _, again = trained(killed, request)  # as after a kill behind the last epoch: nothing is left to train
    for name, gradient in whole.gradients.items():
        assert again.gradients[name].count == gradient.count > 0


def kill_after_first_epoch(spec: Any, workspace: Workspace) -> None:
    """Run the job in a process of its own, as the service does, and kill it once an epoch is kept."""
    job = JobInput(job="job_test", attempt=1, spec=spec, workspace=workspace)
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "worker.process", "--messages-fd", str(writer)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(writer,), start_new_session=True)
    os.close(writer)
    assert process.stdin is not None
    process.stdin.write(job.model_dump_json().encode() + b"\n")
    process.stdin.flush()
    folder, deadline = workspace.checkpoints / "quantized", time.monotonic() + 120
    while not list(folder.glob("epoch-*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdin.close()
    os.close(reader)


def test_seeds_make_the_bytes(workspace: Workspace) -> None:
    found = []
    for index, seed in enumerate((0, 0, 1)):
        request = training(workspace, step={"epochs": 1}, evaluation=None)
        calibration = request.calibration.model_copy(update={"seed": seed})
        found.append(
            trained(fresh(workspace, str(index)), request.model_copy(update={"calibration": calibration}))[1]
        )
    assert_same(found[0], found[1])
    one, other = (trainer.network.state_dict() for trainer in found[1:])
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_training_recovers_what_another_job_lost(workspace: Workspace) -> None:
    """Full precision learns; rounding it to two bits loses it; training from that artifact wins it back."""
    job, trainer = trained(
        workspace, training(workspace, step={"bits": 8, "epochs": 6, "learning_rate": 0.05})
    )
    root = workspace.model_roots[0]
    dense_copy(job.folder, trainer.network).save_pretrained(root / "cifar_resnet")
    still = {
        "init": "model",
        "bits": 2,
        "epochs": 1,
        "learning_rate": 1e-12,
        "range_learning_rate": 0,
        "weight_decay": 0,
    }
    rounded = fresh(workspace, "rounded")
    job, lost = trained(rounded, training(workspace, step=still))
    artifact(job, lost, rounded.artifact)
    step = {"init": "job_00000000-0000-7000-8000-000000000000", "bits": 2, "epochs": 6, "learning_rate": 0.02}
    job, won = trained(fresh(workspace, "won", start=rounded.artifact), training(workspace, step=step))
    before, after = lost.judge(job.images), won.judge(job.images)
    assert after[0] < before[0]
    assert after[1] > before[1] + 0.1


def test_a_start_takes_ranges_over(workspace: Workspace) -> None:
    job, trainer = trained(workspace, training(workspace, step={"epochs": 1}))
    artifact(job, trainer, workspace.artifact)
    step = {
        "init": "job_00000000-0000-7000-8000-000000000000",
        "epochs": 1,
        "learning_rate": 1e-12,
        "range_learning_rate": 0,
    }
    again = fresh(workspace, "again", start=workspace.artifact)
    _, other = trained(again, training(workspace, step=step))
    for name, layer in trainer.layers.items():
        torch.testing.assert_close(other.layers[name].input_range, layer.input_range)
        torch.testing.assert_close(other.layers[name].weight_range, layer.weight_range)
        assert other.layers[name].signed is layer.signed
    with pytest.raises(ModelError, match=r"recipe\.0\.init.*one architecture"):
        trained(again, training(workspace, "resnet", step=step))


@pytest.mark.parametrize("interval", ["large_gradient", "min_max", "fixed", "mse"])
def test_every_interval_is_one_word_away(interval: str, workspace: Workspace) -> None:
    grid = {"interval": interval, "alpha": 0.01, "gamma": 0.7, "bits": 5}
    _, trainer = trained(
        workspace, training(workspace, step={"epochs": 1, "gradient": grid}, evaluation=None)
    )
    gammas = set(trainer.curve[0].gamma.values())
    if interval in ("min_max", "fixed"):
        assert gammas == {1.0 if interval == "min_max" else 0.7}
    else:
        assert max(gammas) < 1
        assert len(gammas) > 1


def test_patience_ends_training_and_keeps_the_best_epoch(workspace: Workspace) -> None:
    step = {"epochs": 30, "patience": 2, "validation": 0.2, "learning_rate": 1e-8, "range_learning_rate": 0}
    progress = Progress(io.StringIO())
    job = prepare_training(training(workspace, step=step).resolve(), workspace, progress)
    trainer, kept, stopped = TrainingRun(job, workspace, progress).quantized()
    assert len(trainer.curve) == kept + 2 < 30
    assert stopped == f"no lower validation loss since epoch {kept}"
    losses = [epoch.validation_loss or 0 for epoch in trainer.curve]
    assert job.held is not None
    assert min(losses) == losses[kept - 1] == pytest.approx(trainer.judge(job.held)[0])
    assert (len(job.images), len(job.held)) == (144, 36)


def test_a_training_that_diverges_gives_the_last_good_epoch(workspace: Workspace) -> None:
    explosive = {"learning_rate": 11, "weight_decay": 1, "epochs": 9}  # weights grow tenfold a step
    outcome = train(workspace, training(workspace, step=explosive, evaluation=None))
    assert isinstance(outcome, Rejected)
    assert outcome.reason == "training-diverged"
    found = outcome.report.training
    assert found is not None
    assert 1 <= found.kept_epoch == len(found.epochs) < 9
    assert f"of epoch {found.kept_epoch + 1}: the loss is" in outcome.detail
    assert outcome.detail.endswith(f"the files are the network in fixed point after epoch {found.kept_epoch}")
    assert outcome.detail.startswith(found.stopped or "-")
    for name, value in quantry.load(workspace.artifact).state_dict().items():
        assert value.isfinite().all(), name


def test_a_training_that_diverges_in_its_first_epoch_leaves_nothing(workspace: Workspace) -> None:
    explosive = {"learning_rate": 100, "weight_decay": 1, "batch_size": 5}
    with pytest.raises(TrainingDiverged, match="of epoch 1: the gradient of resnet"):
        train(workspace, training(workspace, step=explosive, evaluation=None))
    assert not list(workspace.artifact.glob("*"))


def test_a_baseline_that_diverges_is_named_and_costs_no_network(workspace: Workspace) -> None:
    """Four bits stay within their ranges for longer than floats."""
    outcome = train(workspace, training(workspace, step={"learning_rate": 100}))
    assert isinstance(outcome, Rejected)
    assert re.match(
        r"the training in full precision .*: the logits after epoch 1 .* leaves it out; .* after epoch 2",
        outcome.detail,
    )
    assert {row.fp for row in outcome.report.quality} == {None}
    assert (workspace.artifact / "model.safetensors").exists()


def test_an_epoch_whose_network_computes_no_numbers_is_not_kept(workspace: Workspace) -> None:
    """Every tensor is finite, and so is the loss of each step; batch norm in evaluation has other averages."""
    explosive = {"learning_rate": 100, "weight_decay": 1}
    with pytest.raises(
        TrainingDiverged, match="the logits after epoch 1 hold NaN or infinity; the first layer"
    ):
        train(workspace, training(workspace, step=explosive, evaluation=None))
    assert not list(workspace.artifact.glob("*"))


def test_an_epoch_that_leaves_infinity_is_not_kept(workspace: Workspace) -> None:
    explosive = {"epochs": 1, "samples": 30, "learning_rate": 100, "weight_decay": 1, "schedule": "constant"}
    job, trainer = trained(workspace, training(workspace, step=explosive, evaluation=None))
    trainer.network.classifier.bias.data.fill_(1e38)  # all alike: no logit changes; decay makes it -inf
    with pytest.raises(TrainingDiverged, match=r"classifier\.bias is not finite after epoch 2"):
        trainer.epoch(job.images, None)


def test_a_loss_that_is_not_finite_names_step_and_layer_and_the_epochs_before_are_kept(
    workspace: Workspace,
) -> None:
    job, trainer = trained(workspace, training(workspace, step={"epochs": 1}, evaluation=None))
    name = "resnet.stages.1.0.layer.0.normalization"
    trainer.network.get_submodule(name).weight.data.fill_(float("inf"))
    said = rf"step 1 of epoch 2: the loss is nan; .*{name}"
    with pytest.raises(TrainingDiverged, match=said) as error:
        trainer.epoch(job.images, None)
    assert error.value.as_job_error().type == "training-diverged"
    assert list((workspace.checkpoints / "quantized").glob("epoch-00001.*"))


def test_a_gradient_that_is_not_finite_names_its_layer(workspace: Workspace) -> None:
    job, trainer = trained(workspace, training(workspace, step={"epochs": 1}, evaluation=None))
    trainer.network.classifier.register_full_backward_hook(lambda *args: (args[1][0] * float("inf"),))
    with pytest.raises(
        TrainingDiverged, match=r"the gradient of resnet\.stages\.1\.0\.layer\.1\.convolution"
    ):
        trainer.epoch(job.images, None)


def test_layers_without_a_gradient_are_named(workspace: Workspace) -> None:
    job, trainer = trained(workspace, training(workspace, step={"epochs": 1}, evaluation=None))
    said: list[str] = []
    trainer.warn = said.append
    trainer.network.get_submodule("resnet.stages.1.0.layer.1.normalization").weight.data.zero_()
    trainer.network.get_submodule("resnet.stages.1.0.layer.1.normalization").weight.requires_grad_(False)
    trainer.epoch(job.images, None)
    assert any("no gradient reached resnet.stages.1.0.layer.0.convolution" in text for text in said)
    trainer.network.classifier.weight.data.zero_()
    trainer.network.classifier.weight.requires_grad_(False)
    with pytest.raises(TrainingDiverged, match="every gradient of epoch 3 is zero"):
        trainer.epoch(job.images, None)


def test_weights_are_not_needed_where_they_are_drawn(workspace: Workspace) -> None:
    request = training(workspace, step={"epochs": 1}, evaluation=None)
    (workspace.model_roots[0] / "cifar_resnet" / "model.safetensors").unlink()
    trained(workspace, request)
    with pytest.raises(ModelError, match="safetensors"):
        trained(workspace, training(workspace, step={"init": "model"}))


def test_data_and_recipes_that_do_not_fit_are_refused(workspace: Workspace) -> None:
    request = training(workspace)
    file = workspace.model_roots[0] / "images.npz"
    with np.load(file) as found:
        images, labels = found["images"], found["labels"]
    np.savez(file, images=images, labels=labels + 5)
    with pytest.raises(DatasetError, match=r"calibration: .*they do not belong together"):
        trained(workspace, request)
    np.savez(file, images=np.concatenate([images[:9], images[:1]]), labels=labels[:10])
    with pytest.raises(DatasetError, match="stand among"):
        trained(workspace, request)
    training(workspace, "vit")
    np.savez(file, images=images[:2], labels=labels[:2])
    with pytest.raises(DatasetError, match="batch norm"):
        trained(workspace, training(workspace, evaluation=None))
    with pytest.raises(DatasetError, match=r"recipe\.0\.samples"):
        trained(workspace, training(workspace, step={"samples": 500}))
    write_processor(workspace.model_roots[0] / "vit", 8, 3)
    with pytest.raises(ModelError, match="make them agree"):
        trained(workspace, training(workspace, "vit", evaluation=None))
    with pytest.raises(RecipeError, match=r"recipe\.0\.batch_size"):
        trained(workspace, training(workspace, step={"batch_size": 1}))
