"""The folder as a whole: shards, companions, manifest, card, and what happens when the disk is full."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantry.recipe import BiasCompensationStep, GptqStep, RtnStep
from quantry.reports import Manifest, QualityRow, SizeReport
from worker.errors import DiskFull, ExportError
from worker.export import write_manifest, write_model_card
from worker.export.files import whole_or_nothing

Build = Callable[..., Any]


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "quantry"])
def test_shards_hold_at_most_their_size_and_load(
    format: str, tiny: Build, ids: Tensor, tmp_path: Path
) -> None:
    model = tiny("llama")
    manifest = model.export(tmp_path / "source", tmp_path / "out", format, shard_bytes=20_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        assert shard.name == f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with safe_open(shard, framework="pt") as tensors:
            names = list(tensors.keys())
            sizes = [tensors.get_tensor(name).nbytes for name in names]
            assert tensors.metadata() == {"format": "pt"}
        assert sum(sizes) <= 20_000 or len(sizes) == 1
        held.update(dict.fromkeys(names, shard.name))
    assert index["weight_map"] == held
    whole = {entry.path: entry for entry in manifest.files}
    for shard in shards:
        content = shard.read_bytes()
        assert whole[shard.name].sha256 == hashlib.sha256(content).hexdigest()
        assert whole[shard.name].bytes == len(content)
    if format != "gptq":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, model.logits(ids), atol=1e-5, rtol=1e-5)


def test_the_same_export_gives_the_same_bytes(tiny: Build, tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        manifest = tiny("llama", added=".").export(tmp_path / "source", tmp_path / name, "compressed-tensors")
        digests.append({entry.path: entry.sha256 for entry in manifest.files if entry.path != "README.md"})
    assert digests[0] == digests[1]


def test_companions_and_card_and_manifest(tiny: Build, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "additional_chat_templates").mkdir(parents=True)
    texts = {
        "tokenizer.json": "{}",
        "tokenizer.model": "piece",
        "generation_config.json": '{"eos_token_id": 2}',
        "additional_chat_templates/rag.jinja": "{{ x }}",
        "LICENSE": "terms",
        "README.md": "---\nlicense: apache-2.0\n---\n# Base\n",
        "pytorch_model.bin": "must not be copied",
    }
    for name, text in texts.items():
        (source / name).write_text(text)
    recipe = (GptqStep(bits=3, group_size=32), BiasCompensationStep())
    tiny("llama", bits=3).export(
        source, out, "compressed-tensors", recipe=recipe, base_model="owner/base", job="job_1"
    )
    row = QualityRow(metric="perplexity", dataset="pydoc", samples=9, fp=10.0, rtn=14.5, quantized=11.25)
    size = SizeReport(fp_bytes=1000, quantized_bytes=250, effective_bits=3.52, quantized_weights=7)
    write_model_card(
        out,
        format="compressed-tensors",
        base_model="owner/base",
        recipe=recipe,
        source=source,
        quality=[row],
        size=size,
    )
    (out / "report.json").write_text("{}")
    manifest = write_manifest(out, format="compressed-tensors", job="job_1")
    for name in texts.keys() - {"README.md", "pytorch_model.bin"}:
        assert (out / name).read_text() == texts[name]
    assert not (out / "pytorch_model.bin").exists()
    card = (out / "README.md").read_text()
    for words in (
        "license: apache-2.0",
        "base_model: owner/base",
        'pip install "compressed-tensors>=0.18"',
        "| perplexity | pydoc, 9 windows | 10.000 | 14.500 | 11.250 |",
        "GPTQ (Frantar et al. 2022, arXiv:2210.17323): 3 bits, symmetric, groups of 32",
        "Bias compensation per channel",
        "3.52 bits per quantized weight",
    ):
        assert words in card
    assert Manifest.model_validate_json((out / "manifest.json").read_text()) == manifest
    listed = {entry.path: entry for entry in manifest.files}
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert set(listed) == found - {"manifest.json"}
    for name, entry in listed.items():
        content = (out / name).read_bytes()
        assert (entry.bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert [step["method"] for step in config["recipe"]] == ["gptq", "bias_compensation"]


def test_stale_digests_are_never_taken_over(tiny: Build, tmp_path: Path) -> None:
    early = tiny("llama").export(tmp_path / "source", tmp_path / "out", "quantry", recipe=(RtnStep(bits=4),))
    card = tmp_path / "out" / "README.md"
    card.write_text(card.read_text() + "and more")
    late = write_manifest(tmp_path / "out", format="quantry", job=None, known=early.files)
    digests = {entry.path: entry.sha256 for entry in late.files}
    assert digests["README.md"] == hashlib.sha256(card.read_bytes()).hexdigest()


def test_a_model_that_does_not_fit_its_config_is_refused(tiny: Build, tmp_path: Path) -> None:
    model = tiny("llama")
    del model.kept["model.norm.weight"]
    with pytest.raises(ExportError, match=r"model\.norm\.weight"):
        model.export(tmp_path / "source", tmp_path / "out", "compressed-tensors")
    model = tiny("llama")
    model.kept["model.extra.weight"] = torch.zeros(3)
    with pytest.raises(ExportError, match=r"model\.extra\.weight"):
        model.export(tmp_path / "source", tmp_path / "out", "quantry")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_target_with_files_is_left_alone(tiny: Build, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(ExportError, match="not empty"):
        tiny("llama").export(tmp_path / "source", tmp_path / "out", "quantry")
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


@pytest.fixture
def file_limit() -> Iterator[None]:
    """No file of this process may grow beyond 40 kB: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("format", ["compressed-tensors", "quantry", "gptq"])
@pytest.mark.usefixtures("file_limit")
def test_no_room_leaves_nothing_behind(format: str, tiny: Build, tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="nothing was kept"):
        tiny("llama", bits=8).export(tmp_path / "source", tmp_path / "out", format)
    assert list((tmp_path / "out").iterdir()) == []


# A file system of its own, in a mount namespace of its own: the test needs no rights on the machine.
SMALL_DISK = """
import sys, importlib.util
from pathlib import Path
spec = importlib.util.spec_from_file_location("conftest", {conftest!r})
conftest = importlib.util.module_from_spec(spec); sys.modules["conftest"] = conftest
spec.loader.exec_module(conftest)
from worker.errors import DiskFull
model = conftest.build("llama", bits=8)
try:
    model.export(Path({source!r}), Path({target!r}), sys.argv[1], shard_bytes=40_000)
except DiskFull as error:
    print("DiskFull", error.retryable, [path.name for path in Path({target!r}).iterdir()], error)
"""


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "small"
    target.mkdir()
    conftest = str(Path(__file__).with_name("conftest.py"))
    script = SMALL_DISK.format(conftest=conftest, source=str(tmp_path / "source"), target=str(target))
    mount = f'mount -t tmpfs -o size=96k tmpfs {target} && exec {sys.executable} -c "$0" compressed-tensors'
    root = str(Path(__file__).resolve().parents[3])
    done = subprocess.run(
        ["unshare", *(["-m"] if os.geteuid() == 0 else ["-rm"]), "sh", "-c", mount, script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.stdout.startswith("DiskFull True []"), done.stdout + done.stderr
    assert "no space left on device" in done.stdout


def test_errors_that_are_not_the_disk_pass_unchanged(tmp_path: Path) -> None:
    (tmp_path / "half").write_text("written")
    with pytest.raises(PermissionError), whole_or_nothing(tmp_path):
        raise PermissionError(13, "denied")
    assert list(tmp_path.iterdir()) == []
