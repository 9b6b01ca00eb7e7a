"""`/metrics`: the router as Prometheus sees it, made from its state at the moment it is asked."""

from __future__ import annotations

from collections.abc import Iterator

from flume_common.metrics import common, gauge
from prometheus_client import Metric

from flume_router.service import Service


def families(service: Service) -> Iterator[Metric]:
    """What this router knows of itself."""
    yield from common(service.pool.store_connected, service.incarnations())
    yield gauge("flume_router_ready", "1 while new requests have a chance.", service.ready)
    yield gauge("flume_requests_running", "Requests that are being answered.", len(service.in_flight))
