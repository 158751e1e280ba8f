"""End with the parent: a pipe that only the parent holds open reaches its end however the parent dies."""

from __future__ import annotations

import os
import threading


def watch(descriptor: int) -> None:
    """End this process at once when the other end of `descriptor` is closed."""

    def wait() -> None:
        while os.read(descriptor, 4096):
            pass
        os._exit(1)  # nothing to save: all that counts is in the database

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
