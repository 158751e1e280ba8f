"""A real server on loopback with a real database, and hands that do to its jobs what a worker does.

Used by the tests of the client, the CLI and the pages: `from tests.live_server import live, shared_server`.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import uvicorn
from sqlalchemy.orm import Session, sessionmaker

import migrations
from app.main import create_app
from app.security import create_key
from app.shared import leases
from app.shared.database import make_engine, make_sessions
from app.shared.leases import Claim, Step
from app.shared.settings import Settings
from app.shared.storage import Storage
from quantry.jobs import Failed, JobError, Progress, Rejected, State, Succeeded
from quantry.reports import (
    BlockReport,
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
from worker.report import write_report

MODEL = "local:tiny"


class LiveServer:
    """The API in a thread; `stop` and `start` keep the port, the database and the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_model(folder / "models" / "tiny")
        self.settings = Settings(data=folder / "data", model_roots=(folder / "models",))
        self.engine = make_engine(self.settings.database)
        migrations.upgrade(self.engine)
        self.sessions: sessionmaker[Session] = make_sessions(self.engine)
        self.storage = Storage(self.settings.storage)
        self.key = self.new_key("somebody")
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """For a child process that is a user's command: no setting of the server in it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("QUANTRY_")}
        return {**kept, "QUANTRY_URL": self.url, "QUANTRY_API_KEY": self.key, "COLUMNS": "120"}

    def new_key(self, owner: str) -> str:
        with self.sessions() as session:
            return create_key(session, owner=owner, name="test")[1]

    def start(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self.port = listener.getsockname()[1]
        app = create_app(self.settings, sessions=self.sessions)
        self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._listener = listener
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()

    def close(self) -> None:
        self.stop()
        self.engine.dispose()

    def claim(self, job: str) -> Claim:
        with self.sessions() as session:
            claim = leases.claim(session, job, worker="hands")
        assert claim is not None
        return claim

    def step(self, claim: Claim, state: State, stage: str, done: int = 0, total: int = 0) -> None:
        progress = Progress(done=done, total=total, eta_s=float(total - done))
        with self.sessions() as session:
            leases.heartbeat(session, claim, step=Step(state, stage, progress))

    def log(self, claim: Claim, message: str) -> None:
        with self.sessions() as session:
            leases.heartbeat(session, claim, events=[("log", {"message": message})])

    def cancelled(self, claim: Claim) -> None:
        """End a job that is being cancelled, as its worker does."""
        self.fail(claim)

    def fail(self, claim: Claim) -> None:
        error = JobError(type="out-of-memory", title="Out of memory", detail="12 GB needed", retryable=True)
        with self.sessions() as session:
            leases.finish(session, claim, Failed(error=error))

    def succeed(self, claim: Claim, files: Mapping[str, bytes], *, rejected: str | None = None) -> Manifest:
        """Publish an artifact of these files and a report, and end the job with it."""
        folder = self.storage.open_part(claim.job_id, claim.epoch)
        report = make_report(claim)
        write_report(folder, report)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        entries = tuple(entry(path, str(path.relative_to(folder))) for path in found)
        loader = Loader(
            package="transformers", version="5.23.0", snippet='AutoModel.from_pretrained("FOLDER")'
        )
        manifest = Manifest(job=claim.job_id, format="compressed-tensors", loader=loader, files=entries)
        (folder / "manifest.json").write_text(manifest.model_dump_json(indent=1))
        artifact = self.storage.publish(claim.job_id, claim.epoch)
        outcome = (
            Rejected(report=report, manifest=manifest, detail=rejected)
            if rejected
            else Succeeded(report=report, manifest=manifest)
        )
        with self.sessions() as session:
            leases.finish(session, claim, outcome, artifact=artifact)
        return manifest


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    server = LiveServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture
def live(shared_server: LiveServer) -> LiveServer:
    """A server, with the key of an owner who has nothing yet."""
    shared_server.key = shared_server.new_key(f"owner-{uuid.uuid4().hex}")
    return shared_server


def request(**fields: object) -> JobRequest:
    """A small job on the model that the server has."""
    calibration = {"samples": 4, "sequence_length": 32}
    return JobRequest.model_validate({"model": MODEL, "bits": 4, "calibration": calibration, **fields})


def entry(path: Path, name: str) -> FileEntry:
    content = path.read_bytes()
    return FileEntry(path=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def make_report(claim: Claim) -> Report:
    row = QualityRow(
        metric="perplexity", dataset="bundled/pydoc", samples=9, fp=14.0, rtn=19.0, quantized=15.0
    )
    errors = {"relative_mse": 0.01, "relative_mse_rtn": 0.02, "sqnr_db": 20.0}
    layers = tuple(LayerReport(name=f"h.0.{n}", bits=4, group_size=None, **errors) for n in ("fc1", "fc2"))
    blocks = (BlockReport(index=0, relative_mse=0.01, relative_mse_rtn=0.02, mean_error=0.001, seconds=1.0),)
    return Report(
        job=claim.job_id,
        spec=claim.spec,
        quality=(row,),
        size=SizeReport(fp_bytes=4000, quantized_bytes=1000, effective_bits=4.1, quantized_weights=1000),
        layers=layers,
        blocks=blocks,
        cost=CostReport(wall_s=3.0, cpu_s=5.0, peak_rss_bytes=10**9),
        environment={"torch": "2.13.0"},
        fingerprint="0" * 64,
        format="compressed-tensors",
    )


def write_model(folder: Path) -> None:
    """A checkpoint of one OPT block, all zeros: enough for the server, which reads its headers only."""
    hidden, inner, vocabulary, positions = 64, 128, 256, 64
    block = "model.decoder.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "model.decoder.embed_tokens.weight": (vocabulary, hidden),
        "model.decoder.embed_positions.weight": (positions + 2, hidden),
        f"{block}.fc1.weight": (inner, hidden),
        f"{block}.fc1.bias": (inner,),
        f"{block}.fc2.weight": (hidden, inner),
        f"{block}.fc2.bias": (hidden,),
    }
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= {
            f"{block}.self_attn.{name}.weight": (hidden, hidden),
            f"{block}.self_attn.{name}.bias": (hidden,),
        }
    for norm in (
        f"{block}.self_attn_layer_norm",
        f"{block}.final_layer_norm",
        "model.decoder.final_layer_norm",
    ):
        shapes |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
    folder.mkdir(parents=True)
    config = {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))
