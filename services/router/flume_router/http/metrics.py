"""`/metrics`: the router as Prometheus sees it, made from its state at the moment it is asked."""

from __future__ import annotations

from collections.abc import Iterator

from flume_common.metrics import common, counter, gauge
from prometheus_client import Metric

from flume_router.service import Service


def families(service: Service) -> Iterator[Metric]:
    """What this router knows of itself."""
    yield from common(service.pool.store_connected, service.incarnations())
    yield gauge("flume_router_ready", "1 while new requests have a chance.", service.ready)
    yield gauge("flume_requests_running", "Requests that are being answered.", len(service.in_flight))
    yield gauge("flume_requests_waiting", "Requests that have no token yet.", service.in_flight.waiting)
    yield gauge("flume_http_connections", "Connections of HTTP clients.", connections_of(service), by="state")
    yield gauge("flume_http_body_bytes", "Bytes of request bodies being read.", service.bodies.used_bytes)
    yield counter(
        "flume_http_refused_total",
        "Requests and connections that were refused.",
        service.door.refusals.counts,
        by="reason",
    )


def connections_of(service: Service) -> dict[str, float]:
    """Their number by state: idle ones wait for a request."""
    idle = service.door.num_idle
    return {"idle": idle, "active": len(service.door) - idle}
