"""`/metrics`: the router as Prometheus sees it, made from its state at the moment it is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from flume_common.metrics import common, counter, gauge
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily

from flume_router.canary import Canary, Verdict
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
    yield from _canaries(service.pool.canaries)


def connections_of(service: Service) -> dict[str, float]:
    """Their number by state: idle ones wait for a request."""
    idle = service.door.num_idle
    return {"idle": idle, "active": len(service.door) - idle}


def _canaries(canaries: Mapping[str, Canary]) -> Iterator[Metric]:
    """Of the weight nodes that can serve by their own word; one that is gone leaves no series."""
    known = {node: canary for node, canary in canaries.items() if canary.verdict is not Verdict.UNKNOWN}
    yield gauge(
        "flume_canary_success",
        "1 while canaries, or tokens of requests, come through this weight node, or it is merely busy.",
        {node: not canary.failed for node, canary in known.items()},
        by="weight_node",
    )
    yield gauge(
        "flume_canary_duration_seconds",
        "How long the last canary through this weight node took.",
        {node: canary.duration_s for node, canary in known.items() if canary.duration_s is not None},
        by="weight_node",
    )
    runs = CounterMetricFamily(
        "flume_canaries_total",
        "Canaries through this weight node, by what they showed.",
        labels=["weight_node", "verdict"],
    )
    for node, canary in canaries.items():
        for verdict in (Verdict.OK, Verdict.BUSY, Verdict.FAILED):
            runs.add_metric([node, verdict], canary.runs[verdict])
    yield runs
