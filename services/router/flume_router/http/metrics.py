"""`/metrics`: the router as Prometheus sees it, made from its state at the moment it is asked."""

from __future__ import annotations

from collections.abc import Iterator

from flume_common.telemetry import version
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from flume_router.service import Service


def registry_of(service: Service) -> CollectorRegistry:
    """A registry of this service alone; `prometheus_client.generate_latest` renders it."""
    registry = CollectorRegistry(auto_describe=True)
    registry.register(_RouterCollector(service))
    return registry


class _RouterCollector(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        service = self._service
        build = GaugeMetricFamily("flume_build_info", "What runs here.", labels=["version"])
        build.add_metric([version()], 1)
        yield build
        yield GaugeMetricFamily(
            "flume_store_connected",
            "1 while etcd answers; without it requests are served on the members known last.",
            float(service.pool.store_connected),
        )
        yield GaugeMetricFamily(
            "flume_router_ready", "1 while new requests have a chance.", float(service.ready)
        )
        yield GaugeMetricFamily(
            "flume_requests_running", "Requests that are being answered.", float(len(service.in_flight))
        )
