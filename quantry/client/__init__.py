"""The Python client of a Quantry server: submit, follow, download. Needs no torch.

from quantry.client import Client

with Client() as client:
    job = client.submit(model="bundled/opt-tiny", bits=4, correction="bias_compensation")
    job = client.wait(job)
    client.download(job, "opt-tiny-w4")
"""

from quantry.client.client import Client
from quantry.client.download import DownloadError
from quantry.client.errors import (
    ConnectionFailed,
    InvalidRequest,
    ProblemError,
    QuantryError,
    Unauthorized,
    WaitTimeout,
)

__all__ = [
    "Client",
    "ConnectionFailed",
    "DownloadError",
    "InvalidRequest",
    "ProblemError",
    "QuantryError",
    "Unauthorized",
    "WaitTimeout",
]
