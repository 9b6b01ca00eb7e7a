"""The controller as Prometheus sees it, under the names of controller-runtime and client-go.

What only the leader does has counters of its present term; they are 0 while another one leads.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from flume_common.election import Candidate
from flume_common.metrics import counter, epoch_rejected, gauge
from prometheus_client import Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString

from flume_controller.lead import KEY, Leader
from flume_controller.reconcile import Reconciler, Result
from flume_controller.spec import AttentionSpec, AttentionStatus
from flume_controller.views import Report, Wish
from flume_controller.workqueue import Durations, WorkQueue


def families(candidate: Candidate, leader: Leader, wish: Wish, report: Report) -> Iterator[Metric]:
    """Safe to read from another thread: views replace what they hold, the rest are numbers."""
    yield from replicas(wish.spec, report.status)
    yield gauge(
        "leader_election_master_status", "1 for the controller that leads.", candidate.leading,
        name="controller",
    )  # fmt: skip
    yield epoch_rejected("controller", candidate.epoch_rejected)
    reconciler = leader.reconciler or _idle()
    yield from reconciles(reconciler)
    yield from workqueue(reconciler.queue)


def replicas(spec: AttentionSpec | None, status: AttentionStatus | None) -> Iterator[Metric]:
    """What is not known yet is left out. Every controller says the same."""
    counts: dict[str, float] = {}
    if spec is not None:
        counts["desired"] = spec.desired
    if status is not None:
        counts["actual"] = status.ready + status.preparing + status.draining
        counts |= {"ready": status.ready, "draining": status.draining}
    yield gauge(
        "flume_attention_replicas",
        "Attention nodes: wanted, there in any state, ready, and draining; as of the leader's last pass.",
        counts,
        by="state",
    )


def reconciles(reconciler: Reconciler) -> Iterator[Metric]:
    """Of the passes."""
    prefix = "controller_runtime_"
    yield counter(
        f"{prefix}reconcile_total", "Passes by result.", reconciler.reconcile_total, by="result",
        controller=KEY,
    )  # fmt: skip
    for name, about, value in (
        ("reconcile_errors_total", "Passes that failed.", reconciler.reconcile_errors_total),
        (
            "terminal_reconcile_errors_total",
            "Passes that failed in a way that trying again does not help.",
            reconciler.terminal_reconcile_errors_total,
        ),
        (
            "reconcile_panics_total",
            "Passes that failed in a way nobody expected.",
            reconciler.reconcile_panics_total,
        ),
        (
            "reconcile_timeouts_total",
            "Passes that took longer than they may.",
            reconciler.reconcile_timeouts_total,
        ),
    ):
        yield counter(f"{prefix}{name}", about, value, controller=KEY)
    yield _histogram(
        f"{prefix}reconcile_time_seconds", "How long passes take.", reconciler.reconcile_time_seconds,
        controller=KEY,
    )  # fmt: skip
    yield gauge(
        f"{prefix}max_concurrent_reconciles", "Passes that may run at once.",
        reconciler.max_concurrent_reconciles, controller=KEY,
    )  # fmt: skip
    yield gauge(f"{prefix}active_workers", "Passes that run now.", reconciler.active_workers, controller=KEY)


def workqueue(queue: WorkQueue[str]) -> Iterator[Metric]:
    """Of the queue that says when a pass is due."""
    labels = {"name": KEY, "controller": KEY}
    yield gauge("workqueue_depth", "Keys that wait for a worker.", queue.depth, **labels)
    yield counter("workqueue_adds_total", "Keys that were added.", queue.adds_total, **labels)
    yield counter(
        "workqueue_retries_total", "Keys added again after a failure.", queue.retries_total, **labels
    )
    yield _histogram(
        "workqueue_queue_duration_seconds", "How long keys wait.", queue.queue_duration_seconds, **labels
    )
    yield _histogram(
        "workqueue_work_duration_seconds",
        "How long work on a key takes.",
        queue.work_duration_seconds,
        **labels,
    )
    yield gauge(
        "workqueue_unfinished_work_seconds",
        "How long what is being worked on has been, in all.",
        queue.unfinished_work_seconds,
        **labels,
    )
    yield gauge(
        "workqueue_longest_running_processor_seconds",
        "How long the oldest of them has been.",
        queue.longest_running_processor_seconds,
        **labels,
    )


def _histogram(name: str, about: str, durations: Durations, /, **labels: str) -> Metric:
    totals = list(accumulate(list(durations.counts)))  # a copy first: the loop goes on counting
    bounds = [*map(floatToGoString, durations.bounds_s), "+Inf"]
    family = HistogramMetricFamily(name, about, labels=[*labels])
    family.add_metric([*labels.values()], [*zip(bounds, map(float, totals), strict=True)], durations.sum_s)
    return family


def _idle() -> Reconciler:
    """Of a controller that does not lead."""

    async def nothing(_key: str) -> Result:
        return Result()

    return Reconciler(nothing, (KEY,))
