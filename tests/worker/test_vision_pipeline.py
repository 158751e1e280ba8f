"""A whole job on an image classifier in one process: every family, every method, resumed, refused."""

import io
import json
from pathlib import Path
from typing import Any

import factories
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantry.checkpoint import CheckpointError, load
from quantry.jobs import Rejected, Succeeded
from quantry.reports import Report
from quantry.requests import JobRequest
from worker.activations import calibrate_activations
from worker.errors import DatasetError, ModelError, NonFiniteError, RecipeError
from worker.pipeline import run
from worker.prepare import prepare
from worker.progress import Progress
from worker.workspace import Workspace

GRID = {"bits": 4}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "weights": [{"method": "gptq", **GRID}],
    "uniform": [{"method": "gptq", **GRID}, {"method": "uniform", **GRID}],
    "token": [{"method": "rtn", **GRID}, {"method": "uniform", "granularity": "token", **GRID}],
    "ptq4vit": [
        {"method": "rtn", "clip": "mse", **GRID},
        {"method": "ptq4vit", "candidates": 8, "rounds": 1, **GRID},
        {"method": "bias_compensation"},
    ],
    "repq": [{"method": "gptq", **GRID}, {"method": "repq", **GRID}, {"method": "bias_compensation"}],
    "adalog": [{"method": "gptq", **GRID}, {"method": "adalog", "candidates": 8, "rounds": 1, **GRID}],
    "igq": [{"method": "gptq", **GRID}, {"method": "igq", "groups": 3, **GRID}, {"method": "softmax_bias"}],
    "published": [
        {"method": "rtn", **GRID},
        {"method": "uniform", **GRID},
        {"method": "bias_compensation", "granularity": "position_channel", "targets": "published"},
    ],
    "products": [
        {"method": "rtn", **GRID},
        {"method": "uniform", **GRID},
        {
            "method": "bias_compensation",
            "granularity": "position_channel",
            "targets": "published",
            "levels": ["module", "products"],
        },
        {"method": "softmax_bias"},
    ],
}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    roots = tmp_path / "roots"
    roots.mkdir()
    return Workspace(
        job="job_test",
        artifact=tmp_path / "artifact",
        checkpoints=tmp_path / "checkpoints",
        cache=tmp_path / "cache",
        model_roots=(roots,),
    )


def job(workspace: Workspace, family: str, recipe: list[dict[str, Any]], **changes: Any) -> JobRequest:
    """A job on a tiny random classifier, with images that a fixed seed draws."""
    root = workspace.model_roots[0]
    folder = factories.write_classifier(root / "model", family)
    config = json.loads((folder / "config.json").read_text())
    size, channels = config["image_size"], config["num_channels"]
    chance = np.random.default_rng(0)
    images = chance.integers(0, 256, (40, size, size, channels), dtype=np.uint8)
    labels = chance.integers(0, len(config["id2label"]), 40)
    np.savez(root / "images.npz", images=images, labels=labels)
    dataset = {"source": "local", "id": "images.npz"}
    body: dict[str, Any] = {
        "model": {"source": "local", "id": "model"},
        "recipe": recipe,
        "calibration": {"dataset": dataset, "samples": 16},
        "evaluation": {"dataset": dataset},
    }
    return JobRequest.model_validate({**body, **changes})


def quantize(workspace: Workspace, request: JobRequest) -> Succeeded | Rejected:
    return run(request.resolve(), workspace, Progress(io.StringIO()))


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "swin"])
def test_every_family_is_quantized_and_loads(family: str, workspace: Workspace) -> None:
    outcome = quantize(workspace, job(workspace, family, RECIPES["repq"]))
    assert isinstance(outcome, Succeeded)
    report = outcome.report
    assert {row.metric for row in report.quality} >= {"top1", "kl"}
    for row in report.quality:
        assert row.samples == 4
        assert None not in (row.fp, row.rtn, row.quantized)
    assert all(layer.relative_mse is not None for layer in report.layers)
    assert {operand.kind for operand in report.operands} >= {"post_norm", "query", "probabilities"}
    assert report.bit_operations is not None
    assert float(report.verification["relative_difference"]) < 1e-4


def test_a_swin_whose_size_is_no_multiple_of_its_patch_is_padded(workspace: Workspace) -> None:
    request = job(workspace, "swin", RECIPES["uniform"])
    root = workspace.model_roots[0]
    factories.write_classifier(root / "model", "swin", image_size=15)
    report = quantize(workspace, request).report
    assert float(report.verification["relative_difference"]) < 1e-4


def test_the_pooler_of_a_pretrained_network_is_left_out(workspace: Workspace) -> None:
    request = job(workspace, "vit", RECIPES["weights"])
    file = workspace.model_roots[0] / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "vit.pooler.dense.weight": torch.zeros(32, 32)}, file, metadata={"format": "pt"})
    assert isinstance(quantize(workspace, request), Succeeded)
    written = load_file(workspace.artifact / "model.safetensors")
    assert not any("pooler" in name for name in written)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", ["gelu"]),
        ("layer_norm_eps", "x"),
        ("id2label", {name: name for name in "abcde"}),
        ("torch_dtype", "banana"),
        ("return_dict", False),
    ],
)
def test_odd_values_in_the_config_are_named(field: str, value: object, workspace: Workspace) -> None:
    request = job(workspace, "vit", RECIPES["uniform"])
    file = workspace.model_roots[0] / "model" / "config.json"
    config = json.loads(file.read_text()) | {field: value}
    file.write_text(json.dumps({k: v for k, v in config.items() if k != "dtype" or field != "torch_dtype"}))
    with pytest.raises(ModelError, match=r"config\.json"):
        prepare(request.resolve(), workspace, Progress(io.StringIO()))


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_method_runs_and_its_artifact_computes_the_same(name: str, workspace: Workspace) -> None:
    report = quantize(workspace, job(workspace, "vit", RECIPES[name])).report
    assert float(report.verification["relative_difference"]) < 1e-4
    assert report.quality[-1].metric == "kl"
    operations = report.bit_operations
    assert (operations is None) == (name == "weights")
    assert operations is None or (operations.overhead > 0) == (name in ("token", "igq"))  # found as it runs


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)`:FutureWarning")
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_static_grids_are_written_as_onnx_that_onnx_runtime_runs(family: str, workspace: Workspace) -> None:
    recipe = [
        {"method": "rtn", "bits": 8},
        {"method": "uniform", "bits": 8},
        {"method": "bias_compensation"},
        {"method": "softmax_bias"},
    ]
    report = quantize(workspace, job(workspace, family, recipe, format="onnx")).report
    assert report.format == "onnx"
    assert report.verification["loader"] == "onnxruntime"
    assert float(report.verification["relative_difference"]) < 0.02
    names = {path.name for path in workspace.artifact.iterdir()}
    assert names >= {"model.onnx", "config.json", "preprocessor_config.json", "manifest.json", "README.md"}
    assert "model.safetensors" not in names
    assert report.size.quantized_bytes == (workspace.artifact / "model.onnx").stat().st_size
    with pytest.raises(CheckpointError, match="open it with onnxruntime"):
        load(workspace.artifact)


def test_every_long_stage_says_how_far_it_is(workspace: Workspace) -> None:
    recipe = [{"method": "rtn", **GRID}, {"method": "igq", "groups": 2, "allocation": "ilp", **GRID}]
    written = io.StringIO()
    progress = Progress(written)
    prepared = prepare(job(workspace, "vit", recipe).resolve(), workspace, progress)
    calibrate_activations(prepared.model, prepared.spec, prepared.calibration, progress)
    messages = [json.loads(line) for line in written.getvalue().splitlines()]
    last = {m["stage"]: (m["done"], m["total"]) for m in messages if m["type"] == "stage"}
    assert last["processing the calibration images"] == (16, 16)
    assert last["comparing the images"] == (20, 20)
    assert last["processing the evaluation images"] == (4, 4)
    assert last["activations: round to nearest, ranges"] == (16, 16)
    assert last["activations: igq, ranges"] == (16, 16)
    trials = 2 * 5 * 4  # two blocks, four inputs of linear layers and the softmax; 1, 2, 3 or 4 groups
    assert last["activations: igq, bounds"] == (trials, trials)
    assert last["activations: igq, perturbations"] == (16 * (1 + trials), 16 * (1 + trials))


def test_a_resumed_job_has_the_same_bytes(workspace: Workspace, tmp_path: Path) -> None:
    request = job(workspace, "vit", RECIPES["repq"])
    quantize(workspace, request)
    whole = load_file(workspace.artifact / "model.safetensors")
    for block in sorted(workspace.checkpoints.glob("block-*"))[2:]:
        block.unlink()
    again = workspace.model_copy(update={"artifact": tmp_path / "again"})
    quantize(again, request)
    resumed = load_file(again.artifact / "model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_compensation_takes_the_mean_error_away(workspace: Workspace) -> None:
    recipe = [{"method": "rtn", "bits": 3}, {"method": "uniform", "bits": 4}]
    plain = quantize(workspace, job(workspace, "vit", recipe, evaluation=None)).report
    recipe = [*recipe, {"method": "bias_compensation"}]
    corrected = quantize(workspace, job(workspace, "vit", recipe, evaluation=None)).report
    before = [block.mean_error or 0 for block in plain.blocks]
    after = [block.mean_error or 0 for block in corrected.blocks]
    assert all(b <= a for a, b in zip(before, after, strict=True) if a)
    assert max(after) < 1e-4


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_biases_of_products_are_stored_counted_and_loaded(family: str, workspace: Workspace) -> None:
    def quantized(levels: list[str]) -> Report:
        form = {"granularity": "position_channel", "targets": "published", "levels": levels}
        recipe = [*RECIPES["uniform"], {"method": "bias_compensation", **form}]
        return quantize(workspace, job(workspace, family, recipe)).report

    plain = quantized(["module"])
    report = quantized(["module", "products"])
    assert float(report.verification["relative_difference"]) < 1e-4
    tensors = load_file(workspace.artifact / "model.safetensors")
    added = [tensor for name, tensor in tensors.items() if name.endswith(("scores.bias", "context.bias"))]
    assert len(added) == 2 * (2 if family == "vit" else 3)
    assert all(tensor.any() for tensor in added)
    size = 4 * sum(tensor.numel() for tensor in added)
    assert report.size.added_bias_bytes - (plain.size.added_bias_bytes or 0) == size
    assert report.size.effective_bits - plain.size.effective_bits == pytest.approx(
        8 * size / report.size.quantized_weights
    )
    assert float(str(report.estimate["effective_bits"])) >= report.size.effective_bits - 1e-3


def test_the_accuracy_gate_rejects(workspace: Workspace) -> None:
    recipe = [{"method": "rtn", "bits": 2}, {"method": "uniform", "bits": 2}]
    request = job(workspace, "vit", recipe, accept={"accuracy_drop_max": 0})
    outcome = quantize(workspace, request)
    top1 = next(row for row in outcome.report.quality if row.metric == "top1")
    assert top1.fp is not None
    assert top1.quantized is not None
    assert isinstance(outcome, Rejected) == (top1.quantized < top1.fp)


@pytest.mark.parametrize(
    ("recipe", "changes", "path"),
    [
        (RECIPES["weights"], {"format": "gptq"}, "format"),
        (
            [{"method": "rtn", "bits": 4}, {"method": "bias_compensation", "levels": ["block"]}],
            {"family": "dinov2"},
            "recipe.1.levels",
        ),
        ([{"method": "rtn", "bits": 4, "group_size": 24}], {}, "recipe.0.group_size"),
        (
            [*RECIPES["uniform"], {"method": "bias_compensation", "levels": ["module", "products"]}],
            {},
            "recipe.2.levels",
        ),
        (
            [
                {"method": "rtn", "bits": 4},
                {
                    "method": "bias_compensation",
                    "granularity": "position_channel",
                    "targets": "published",
                    "levels": ["products"],
                },
            ],
            {},
            "recipe.1.levels",
        ),
        ([{"method": "rtn", "bits": 8}, {"method": "smoothquant"}], {}, "recipe.1"),
        (RECIPES["uniform"], {"compute_dtype": "bfloat16"}, "compute_dtype"),
        (RECIPES["uniform"], {"accept": {"perplexity_increase_max": 0.1}}, "accept.perplexity_increase_max"),
    ],
)
def test_what_a_classifier_cannot_take_is_refused(
    recipe: list[dict[str, Any]], changes: dict[str, Any], path: str, workspace: Workspace
) -> None:
    family = changes.get("family", "vit")
    rest = {name: value for name, value in changes.items() if name != "family"}
    with pytest.raises(RecipeError, match=path):
        quantize(workspace, job(workspace, family, recipe, **rest))


@pytest.mark.parametrize("name", ["weights", "token", "ptq4vit"])
def test_a_network_that_overflows_is_refused_before_it_is_fitted(name: str, workspace: Workspace) -> None:
    request = job(workspace, "vit", RECIPES[name], evaluation=None)
    file = workspace.model_roots[0] / "model" / "model.safetensors"
    tensors = load_file(file)
    norm = next(key for key in tensors if key.endswith("layernorm_before.weight"))
    save_file({**tensors, norm: torch.full_like(tensors[norm], 1e30)}, file, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="in full precision"):
        quantize(workspace, request)
    assert not workspace.artifact.exists()


def test_metrics_that_can_only_be_perfect_are_refused(workspace: Workspace) -> None:
    dataset = {"source": "local", "id": "images.npz"}
    request = job(workspace, "vit", RECIPES["uniform"], evaluation={"dataset": dataset, "metrics": ["top5"]})
    with pytest.raises(RecipeError, match=r"evaluation\.metrics: top5 of a model with 5 classes"):
        quantize(workspace, request)


def test_data_that_does_not_fit_is_refused(workspace: Workspace) -> None:
    request = job(workspace, "vit", RECIPES["uniform"])
    root = workspace.model_roots[0]
    with np.load(root / "images.npz") as found:
        images, labels = found["images"], found["labels"]
    np.savez(root / "images.npz", images=images, labels=labels + 1000)
    with pytest.raises(DatasetError, match="they do not belong together"):
        quantize(workspace, request)
    np.savez(root / "images.npz", images=images[:8], labels=labels[:8])
    with pytest.raises(DatasetError, match=r"calibration\.samples"):
        quantize(workspace, request)
    factories.edit_json(root / "model" / "preprocessor_config.json", size={"height": 8, "width": 8})
    np.savez(root / "images.npz", images=images, labels=labels)
    with pytest.raises(ModelError, match="make them agree"):
        quantize(workspace, request)
    (root / "model" / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="preprocessor_config"):
        quantize(workspace, request)
