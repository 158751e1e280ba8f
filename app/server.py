"""Run the application under uvicorn, and end it without making those who follow a job wait."""

from __future__ import annotations

import gc
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

GRACE_S = 5  # for downloads under way; streams and long polls end at once


class Server(uvicorn.Server):
    """On a signal to stop, ends every wait first: uvicorn itself only waits for them."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        app = self.config.app
        if isinstance(app, FastAPI):
            app.state.services.watcher.close()
        super().handle_exit(sig, frame)


def run(app: FastAPI, *, host: str, port: int, sockets: list[socket.socket] | None = None) -> None:
    """Serve until a signal."""
    gc.collect()
    gc.freeze()  # never garbage from here on: looking through it would stop all requests for 0.2 s
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,  # app.api.edge writes it
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    Server(config).run(sockets=sockets)
