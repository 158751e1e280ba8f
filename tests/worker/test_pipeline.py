"""A whole job in one process: from a spec to a folder that loads, and every refusal on the way."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import factories
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantry.families import FAMILIES
from quantry.jobs import Rejected, Succeeded
from quantry.reports import Manifest
from quantry.requests import JobRequest
from worker.errors import (
    DatasetError,
    DeviceError,
    DiskFull,
    ModelError,
    ModelNotFound,
    NonFiniteError,
    QuantizationError,
    RecipeError,
)
from worker.pipeline import run
from worker.process import failure
from worker.progress import Progress
from worker.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    roots = tmp_path / "roots"
    roots.mkdir()
    factories.write_text(roots / "text.txt")
    return Workspace(
        job="job_test",
        artifact=tmp_path / "artifact",
        checkpoints=tmp_path / "checkpoints",
        cache=tmp_path / "cache",
        model_roots=(roots,),
        offline=True,
        threads=1,
    )


def submit(workspace: Workspace, **fields: object) -> Succeeded | Rejected:
    text = {"source": "local", "id": "text.txt"}
    request = {
        "model": "local:model",
        "bits": 3,
        "calibration": {"dataset": text, "samples": 16, "sequence_length": 32},
        "evaluation": {"dataset": text},
        **fields,
    }
    if "recipe" in fields:
        del request["bits"]
    spec = JobRequest.model_validate(request).resolve()
    with (workspace.checkpoints.parent / "messages").open("w") as out:
        return run(spec, workspace, Progress(out))


def write_model(workspace: Workspace, name: str = "llama", **changes: object) -> Path:
    return factories.write_checkpoint(workspace.model_roots[0] / "model", name, **changes)


@pytest.mark.parametrize(
    ("name", "fields", "written"),
    [
        ("llama", {"correction": "bias_compensation", "group_size": 16}, "compressed-tensors"),
        ("opt", {"correction": "bias_compensation", "bits": 2}, "compressed-tensors"),
        ("gpt2", {"correction": "bias_compensation"}, "quantry"),
        ("gemma3_text", {"correction": "bias_compensation"}, "quantry"),
        ("gpt_neox", {"method": "rtn", "bits": 5}, "compressed-tensors"),
        ("qwen2", {"correction": "bias_compensation", "symmetric": False}, "quantry"),
    ],
)
def test_a_job_ends_in_a_folder_that_proves_itself(
    name: str, fields: dict[str, object], written: str, workspace: Workspace
) -> None:
    write_model(workspace, name)
    outcome = submit(workspace, **fields)
    assert isinstance(outcome, Succeeded)
    report, folder = outcome.report, workspace.artifact
    assert report.format == written
    (row,) = report.quality
    assert row.fp is not None
    assert row.quantized is not None
    assert report.verification["argmax_agreement"] > 0.99
    stored = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert report.size.quantized_bytes == stored
    assert fields.get("bits", 3) < report.size.effective_bits < 9
    assert Manifest.model_validate_json((folder / "manifest.json").read_text()) == outcome.manifest
    assert {f.path for f in outcome.manifest.files} | {"manifest.json"} == {f.name for f in folder.iterdir()}
    assert json.loads((folder / "report.json").read_text())["fingerprint"] == report.fingerprint
    assert len(report.layers) == 2 * len(
        FAMILIES[json.loads((folder / "config.json").read_text())["model_type"]].linears
    )


@pytest.mark.parametrize("name", ["opt", "llama", "gemma3_text"])
def test_softmax_of_a_language_model_is_corrected(name: str, workspace: Workspace) -> None:
    write_model(workspace, name)
    steps = [{"method": "gptq", "bits": 4}, {"method": "softmax_bias", "bits": 4}]
    report = submit(workspace, recipe=steps).report
    assert report.format == "quantry"
    assert float(report.verification["relative_difference"]) < 1e-4
    assert len(report.operands) == 2
    for operand in report.operands:
        assert operand.kind == "probabilities"
        assert operand.row_sum_after == pytest.approx(1, abs=1e-6)
        assert operand.row_sum_before != pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_w8a8_is_smoothed_and_loads_in_stock_transformers(
    name: str, granularity: str, workspace: Workspace
) -> None:
    write_model(workspace, name)
    steps = [{"method": "rtn", "bits": 8}, {"method": "smoothquant", "granularity": granularity}]
    report = submit(workspace, recipe=steps).report
    assert report.format == "compressed-tensors"
    assert float(report.verification["relative_difference"]) < 1e-4
    config = json.loads((workspace.artifact / "config.json").read_text())
    assert config["quantization_config"]["format"] == "int-quantized"
    (row,) = report.quality
    assert row.quantized == pytest.approx(row.fp, rel=0.05)


def test_fewer_than_8_weight_bits_beside_smoothquant_are_packed(workspace: Workspace) -> None:
    write_model(workspace)
    steps = [{"method": "gptq", "bits": 4}, {"method": "smoothquant"}]
    report = submit(workspace, recipe=steps).report
    assert report.format == "quantry"
    assert report.size.effective_bits < 6
    with pytest.raises(ValueError, match="8-bit weights"):
        submit(workspace, recipe=steps, format="compressed-tensors")


@pytest.mark.parametrize(
    ("recipe", "fields", "message"),
    [
        ([{"method": "rtn", "bits": 4}, {"method": "igq", "bits": 4}], {}, "recipe.1"),
        ([{"method": "rtn", "bits": 8}], {"accept": {"accuracy_drop_max": 0.1}}, "accept.accuracy_drop_max"),
    ],
)
def test_what_only_classifiers_take_is_refused(
    recipe: list[dict[str, object]], fields: dict[str, object], message: str, workspace: Workspace
) -> None:
    write_model(workspace)
    with pytest.raises(RecipeError, match=message):
        submit(workspace, recipe=recipe, **fields)


def test_the_gptq_layout_passes_through_a_job(workspace: Workspace) -> None:
    write_model(workspace, hidden_size=64, intermediate_size=96)
    outcome = submit(workspace, bits=4, format="gptq")
    assert outcome.report.format == "gptq"
    assert outcome.report.verification["argmax_agreement"] > 0.99


def test_the_bytes_are_the_same_after_a_resume(workspace: Workspace, tmp_path: Path) -> None:
    write_model(workspace)
    submit(workspace, correction="bias_compensation")
    first = (workspace.artifact / "model.safetensors").read_bytes()
    (workspace.checkpoints / "block-00001.safetensors").unlink()
    submit(workspace, correction="bias_compensation")
    assert (workspace.artifact / "model.safetensors").read_bytes() == first
    shutil.rmtree(workspace.checkpoints)
    submit(workspace, correction="bias_compensation")
    assert (workspace.artifact / "model.safetensors").read_bytes() == first


def test_a_missed_quality_gate_rejects_but_keeps_the_files(workspace: Workspace) -> None:
    write_model(workspace)
    outcome = submit(workspace, bits=2, method="rtn", accept={"perplexity_increase_max": 1e-9})
    assert isinstance(outcome, Rejected)
    assert "accept.perplexity_increase_max" in outcome.detail
    assert (workspace.artifact / "model.safetensors").exists()


def test_no_evaluation_is_allowed(workspace: Workspace) -> None:
    write_model(workspace)
    outcome = submit(workspace, evaluation=None)
    assert outcome.report.quality == ()
    assert outcome.report.layers[0].relative_mse is None


def test_evaluating_on_the_calibration_text_is_refused_unless_allowed(workspace: Workspace) -> None:
    write_model(workspace)
    text = {"source": "local", "id": "text.txt", "split": "train"}
    with pytest.raises(DatasetError, match=r"% of text.txt \(train\) also stands in the calibration windows"):
        submit(workspace, evaluation={"dataset": text})
    outcome = submit(workspace, evaluation={"dataset": text, "allow_overlap": True})
    assert any("also stands in the calibration windows" in warning for warning in outcome.report.warnings)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": "local:absent"}, ModelNotFound, "absent is not below any"),
        ({"model": "bundled/absent"}, ModelNotFound, "there is no bundled model"),
        ({"model": "nobody/absent"}, ModelNotFound, "not in the cache, and the server is offline"),
        (
            {"group_size": 24},
            RecipeError,
            r"24 does not divide the 32 columns of .*; 16, 8, 4, 2 would divide",
        ),
        ({"bits": 4, "format": "gguf", "group_size": 32}, RecipeError, "48 columns"),
        (
            {
                "calibration": {
                    "dataset": {"source": "local", "id": "text.txt"},
                    "samples": 8000,
                    "sequence_length": 64,
                }
            },
            DatasetError,
            "8000 were asked for",
        ),
        (
            {"calibration": {"sequence_length": 65}},
            RecipeError,
            "65 tokens are more than the model's context of 64",
        ),
        ({"device": "cuda"}, DeviceError, "no CUDA device"),
    ],
)
def test_refusals_say_what_and_where(
    fields: dict[str, object], error: type[QuantizationError], message: str, workspace: Workspace
) -> None:
    if error is DeviceError and torch.cuda.is_available():
        pytest.fail("run this test where there is no CUDA device")
    write_model(workspace)
    with pytest.raises(error, match=message):
        submit(workspace, **fields)
    assert not workspace.artifact.exists() or not any(workspace.artifact.iterdir())


def test_a_folder_that_is_no_safe_checkpoint_is_refused(workspace: Workspace) -> None:
    folder = write_model(workspace)
    whole = (folder / "config.json").read_text()
    factories.edit_json(folder / "config.json", auto_map={"AutoModel": "x.Y"})
    with pytest.raises(ModelError, match="remote code"):
        submit(workspace)
    factories.edit_json(folder / "config.json", auto_map=None, model_type="mystery")
    (folder / "config.json").write_text(whole.replace('"llama"', '"mystery"'))
    with pytest.raises(ModelError, match="architecture 'mystery' is not supported; supported: gemma"):
        submit(workspace)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        submit(workspace)
    (folder / "config.json").write_text(whole)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        submit(workspace)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin is a pickle or code and is refused"):
        submit(workspace)


def test_a_model_that_computes_nan_fails_with_the_layer(workspace: Workspace) -> None:
    folder = write_model(workspace)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"].fill_(3e38)  # finite, but its products are not
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"the inputs of model\.layers\.0\.\S+ hold NaN or infinity"):
        submit(workspace)


def test_a_full_disk_is_said_and_nothing_is_left(workspace: Workspace, tmp_path: Path) -> None:
    write_model(workspace, hidden_size=128, intermediate_size=512)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)], check=True)
    try:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - its type is what the border makes of it
            submit(workspace.model_copy(update={"artifact": small / "artifact"}), bits=8)
        assert failure(caught.value).type == DiskFull.type
        assert [f for f in small.rglob("*") if f.is_file()] == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_worker_imports_nothing_of_the_servers() -> None:
    servers = "('fastapi', 'celery', 'sqlalchemy')"
    code = f"import sys, worker.pipeline; print([m for m in sys.modules if m.split('.')[0] in {servers}])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip().splitlines()[-1] == "[]"
