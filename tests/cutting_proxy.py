"""A TCP proxy that breaks connections: what a bad network does to a client."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self


class CuttingProxy:
    """Forwards to a port of this host.

    cuts: how many bytes of answers the first, second, ... connection brings before it ends; later ones are
    whole. replace: bytes to exchange for as many others in every answer.
    """

    def __init__(self, port: int, cuts: Sequence[int], *, replace: tuple[bytes, bytes] | None = None) -> None:
        self.target = port
        self.cuts = list(cuts)
        self.replace = replace
        self.cut = 0
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._spawn(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def _spawn(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                limit = self.cuts.pop(0) if self.cuts else None
            server = socket.create_connection(("127.0.0.1", self.target))
            self._spawn(self._forward, client, server)
            self._spawn(self._answer, server, client, limit)

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        try:
            while data := client.recv(65536):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def _answer(self, server: socket.socket, client: socket.socket, limit: int | None) -> None:
        sent = 0
        try:
            while data := server.recv(65536):
                if self.replace:
                    data = data.replace(*self.replace)
                if limit is not None and sent + len(data) > limit:
                    client.sendall(data[: limit - sent])
                    self.cut += 1
                    return
                client.sendall(data)
                sent += len(data)
        except OSError:
            pass
        finally:
            for end in (client, server):  # shut down first: the other thread still reads
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
