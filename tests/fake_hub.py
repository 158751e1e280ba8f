"""A model hub on loopback: the requests that huggingface_hub makes to read a repository, over real HTTP.

    with FakeHub() as hub:
        commit = hub.add_model("someone/tiny", folder)
        HfApi(endpoint=hub.url).model_info("someone/tiny")

Answers /api/{models,datasets}/<id>[/revision/<rev>] and [/datasets/]<id>/resolve/<rev>/<file> with HEAD,
Range and the X-Repo-Commit, X-Linked-* and ETag headers; every repository has the branch `main`. What was
asked is kept in `requests`; `fail_with` makes it fail.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

_INFO = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?")
_TREE = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)")
_FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Repository:
    """Commits, each a mapping from file name to content, and the branches that name them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


class FakeHub:
    """The server; a context manager that stops it."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.fail_with: int | None = None
        self.ignore_ranges = False
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add_model(self, name: str, folder: Path, *, branch: str = "main") -> str:
        """Commit the files of a folder to a branch; returns the commit."""
        return self.add("models", name, read_files(folder), branch=branch)

    def add(self, kind: str, name: str, files: dict[str, bytes], *, branch: str = "main") -> str:
        """Commit files to a repository of `kind` (models or datasets); returns the commit."""
        digest = hashlib.sha1(usedforsecurity=False)
        for path, content in sorted(files.items()):
            digest.update(path.encode() + b"\0" + content)
        commit = digest.hexdigest()
        repository = self.repositories.setdefault((kind, name), Repository())
        repository.commits[commit] = files
        repository.branches[branch] = commit
        return commit


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output clean; requests are in `hub.requests`."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.hub.fail_with is not None:
            self._send(self.hub.fail_with, {}, b"failing on purpose")
        elif match := _TREE.fullmatch(path):
            self._tree(*match.groups())
        elif match := _INFO.fullmatch(path):
            self._info(*match.groups())
        elif match := _FILE.fullmatch(path):
            self._file(*match.groups())
        else:
            self._send(404, {}, b"")

    def _find(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit, or None after the answer that the hub gives for what is missing."""
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            self._send(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"}, b"")
            return None
        found = repository.at(revision)
        if found is None:
            message = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no such revision"}
            self._send(404, message, b"")
        return found

    def _info(self, kind: str, name: str, revision: str | None) -> None:
        found = self._find(kind, name, revision or "main")
        if found is not None:
            commit, files = found
            siblings = [{"rfilename": path, "size": len(content)} for path, content in sorted(files.items())]
            answer = {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
            self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _tree(self, kind: str, name: str, revision: str) -> None:
        found = self._find(kind, name, revision)
        if found is not None:
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in sorted(found[1].items())
            ]
            self._send(200, {"Content-Type": "application/json"}, json.dumps(entries).encode())

    def _file(self, datasets: str | None, name: str, revision: str, path: str) -> None:
        found = self._find(datasets or "models", name, revision)
        if found is None:
            return
        commit, files = found
        content = files.get(path)
        if content is None:
            missing = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such file"}
            self._send(404, {**missing, "X-Repo-Commit": commit}, b"")
            return
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        wanted = _RANGE.fullmatch(self.headers.get("Range", ""))
        if wanted is None or self.hub.ignore_ranges:
            self._send(200, headers, content)
            return
        start, stop = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
        if start >= len(content):
            self._send(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
            return
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(206, headers, content[start:stop])

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            try:
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):  # the client has read enough
                self.close_connection = True
