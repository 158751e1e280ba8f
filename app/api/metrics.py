"""The numbers behind /metrics; each app has a registry of its own."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Metrics:
    """What this process counted since it started, and what the database says at each look."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._requests = Counter(
            "quantry_http_requests",
            "Requests answered",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "quantry_http_request_seconds",
            "Time to the end of the response, waiting included",
            ("route",),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._jobs = Gauge("quantry_jobs", "Jobs of all owners", ("state",), registry=self.registry)
        self._waiting = Gauge(
            "quantry_waiting_clients", "Long polls and event streams", registry=self.registry
        )

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request; an unknown method is one label, so that clients cannot make more."""
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def set_jobs(self, counts: Mapping[str, int], waiting: int) -> None:
        for state, count in counts.items():
            self._jobs.labels(state).set(count)
        self._waiting.set(waiting)

    def render(self) -> bytes:
        return generate_latest(self.registry)
