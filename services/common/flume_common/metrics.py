"""What Prometheus reads: families made from the state of a service at the moment it asks.

Nothing is counted here: a service's `metrics` module gives families of what the service knows anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from flume_common.membership import State
from flume_common.telemetry import version

Collect = Callable[[], Iterable[Metric]]
_Family = TypeVar("_Family", GaugeMetricFamily, CounterMetricFamily)


def gauge(
    name: str, about: str, value: float | Mapping[str, float], /, *, by: str = "", **labels: str
) -> Metric:
    """A value, or with `by` one for each value of that label. `labels` are on all of them."""
    return _filled(GaugeMetricFamily(name, about, labels=_names(labels, by)), value, labels)


def counter(
    name: str, about: str, value: float | Mapping[str, float], /, *, by: str = "", **labels: str
) -> Metric:
    """As `gauge`; the name ends in `_total`."""
    return _filled(CounterMetricFamily(name, about, labels=_names(labels, by)), value, labels)


def _names(labels: Mapping[str, str], by: str) -> list[str]:
    return [*labels, by] if by else [*labels]


def _filled(family: _Family, value: float | Mapping[str, float], labels: Mapping[str, str]) -> _Family:
    fixed: list[str] = [*labels.values()]
    if isinstance(value, Mapping):
        for name, one in value.items():
            family.add_metric([*fixed, name], float(one))
    else:
        family.add_metric(fixed, float(value))
    return family


def common(store_connected: bool, incarnations: int = 0) -> Iterator[Metric]:
    """Of every service. `incarnations`: how often etcd turned out to be another one than before."""
    yield gauge("flume_build_info", "What runs here.", 1, version=version())
    yield gauge(
        "flume_store_connected",
        "1 while etcd answers; without it the service goes on with what it knew last.",
        store_connected,
    )
    yield counter(
        "flume_store_incarnations_total",
        "Changes of the cluster's incarnation seen: etcd came back empty, older or as another cluster's.",
        incarnations,
    )


def node_state(state: State) -> Metric:
    """1 for the state a node is in, 0 for the others."""
    values = {item.lower(): item is state for item in State}
    return gauge("flume_node_state", "1 for the state this node is in.", values, by="state")


def epoch_rejected(component: str, messages: int) -> Metric:
    """What was refused because it came from the past."""
    about = "Messages and writes that were refused for an older epoch."
    return counter("flume_epoch_rejected_total", about, messages, component=component)


def registry_of(*sources: Collect) -> CollectorRegistry:
    """A registry of this service alone, with the standard metrics of its process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    for source in sources:
        registry.register(_Collected(source))
    return registry


class _Collected(Collector):
    def __init__(self, collect: Collect) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()


def engine_restarts(deaths: int) -> Metric:
    """Engines of this node that ended and were replaced."""
    return counter("flume_engine_restarts_total", "Engines that ended, for whatever reason.", deaths)
