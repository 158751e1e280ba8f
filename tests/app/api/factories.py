"""Checkpoints, keys, and jobs in any state, as tests of the API need them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch
from safetensors.torch import save_file
from sqlalchemy.orm import Session, sessionmaker

from app.security import Scope, create_key
from app.shared import jobs, leases
from app.shared.leases import Claim
from app.shared.storage import Storage
from quantry.jobs import Succeeded
from quantry.reports import (
    CostReport,
    FileEntry,
    LayerReport,
    Loader,
    Manifest,
    QualityRow,
    Report,
    SizeReport,
)
from quantry.requests import JobRequest

HIDDEN, LAYERS, VOCABULARY, CONTEXT = 32, 2, 64, 64
REQUEST: dict[str, Any] = {
    "model": "local:tiny",
    "bits": 4,
    "calibration": {"samples": 4, "sequence_length": 16},
}


def write_checkpoint(folder: Path, **config: Any) -> Path:
    """A Llama of two layers as a folder of transformers: config, float32 safetensors, tokenizer."""
    folder.mkdir(parents=True)
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text("{}")
    save_file(tensors(), folder / "model.safetensors")
    return folder


def tensors() -> dict[str, torch.Tensor]:
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    for block in range(LAYERS):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{block}.self_attn.{name}.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate_proj", "up_proj"):
            shapes[f"model.layers.{block}.mlp.{name}.weight"] = (2 * HIDDEN, HIDDEN)
        shapes[f"model.layers.{block}.mlp.down_proj.weight"] = (HIDDEN, 2 * HIDDEN)
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


@dataclass
class Keys:
    """Makes API keys."""

    sessions: sessionmaker[Session]

    def make(self, owner: str, *scopes: Scope) -> dict[str, str]:
        """Headers with a key of `owner`; all scopes unless some are named."""
        with self.sessions() as session:
            _, key = create_key(
                session, owner=owner, name="test", scopes=scopes or ("read", "write", "admin")
            )
        return {"Authorization": f"Bearer {key}"}


@dataclass
class Jobs:
    """Makes jobs in the database as the worker's side would leave them."""

    sessions: sessionmaker[Session]
    storage: Storage

    def queued(self, owner: str = "alice", **fields: Any) -> str:
        with self.sessions() as session:
            return jobs.submit(session, JobRequest(**{**REQUEST, **fields}).resolve(), owner=owner)[0].id

    def running(self, owner: str = "alice", **fields: Any) -> Claim:
        job_id = self.queued(owner, **fields)
        with self.sessions() as session:
            claim = leases.claim(session, job_id, worker="w1")
        assert claim is not None
        return claim

    def succeeded(self, files: dict[str, bytes] | None = None, owner: str = "alice") -> str:
        """A job with an artifact of these files, a report and a manifest."""
        claim = self.running(owner)
        self.finish(claim, files or {"model.safetensors": b"0123456789" * 100})
        return claim.job_id

    def finish(self, claim: Claim, files: dict[str, bytes]) -> None:
        report = make_report()
        page = b"<!doctype html><title>Report</title>"
        files = {**files, "report.json": report.model_dump_json().encode(), "report.html": page}
        part = self.storage.open_part(claim.job_id, claim.epoch)
        for name, content in files.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_bytes(content)
        entries = [
            FileEntry(path=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
            for name, content in files.items()
        ]
        loader = Loader(package="transformers", version="5", snippet="...")
        manifest = Manifest(job=claim.job_id, format="quantry", loader=loader, files=tuple(entries))
        (part / "manifest.json").write_text(manifest.model_dump_json())
        artifact = self.storage.publish(claim.job_id, claim.epoch)
        with self.sessions() as session:
            outcome = Succeeded(report=report, manifest=manifest)
            assert leases.finish(session, claim, outcome, artifact=artifact) == "succeeded"


def make_report() -> Report:
    layer = {"bits": 4, "group_size": None, "sqnr_db": 20.0}
    return Report(
        quality=(QualityRow(metric="perplexity", dataset="d", samples=3, fp=10, rtn=12, quantized=11),),
        size=SizeReport(fp_bytes=8, quantized_bytes=2, effective_bits=4.1, quantized_weights=4),
        layers=(
            LayerReport(name="a", relative_mse=0.01, **layer),
            LayerReport(name='b,"c', relative_mse=0.02, warnings=("one", "two"), **layer),
        ),
        blocks=(),
        cost=CostReport(wall_s=1, cpu_s=2, peak_rss_bytes=3),
        environment={"torch": "2"},
        fingerprint="f",
        format="quantry",
    )


def check(response: httpx2.Response, status: int, type: str) -> dict[str, Any]:
    """The response is this problem, whole and well-formed."""
    body: dict[str, Any] = response.json()
    assert (response.status_code, body["type"]) == (status, f"/problems/{type}"), response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.headers["Cache-Control"] == "no-store"
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    return body
