"""The node as Prometheus sees it.

Counters are the engine's, so they begin at 0 with a new one; those of routes are the supervisor's.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from flume_common.metrics import counter, engine_restarts, epoch_rejected, gauge, node_state
from flume_common.route_store import RouteWriter
from prometheus_client import Metric

from flume_weight import messages as m
from flume_weight.supervisor import Supervisor


def families(supervisor: Supervisor, routes: RouteWriter) -> Iterator[Metric]:
    """Safe to read from another thread: numbers, and messages that are replaced, never altered."""
    yield node_state(supervisor.serving.state)
    stages = supervisor.sequences.count()
    waiting = stages[m.Stage.QUEUED] + stages[m.Stage.WAITING]
    yield gauge("flume_requests_running", "Sequences that have a place in steps.", stages.total() - waiting)
    yield gauge(
        "flume_requests_waiting",
        "Sequences of which nothing has been computed yet, or that wait for KV memory.",
        waiting,
    )
    yield gauge(
        "flume_requests",
        "Sequences by what they do.",
        {stage.value.lower(): stages[stage] for stage in m.Stage},
        by="state",
    )
    yield gauge(
        "flume_kv_capacity_tokens",
        "Tokens for which the attention nodes it is attached to have memory.",
        supervisor.capacity_tokens,
    )
    yield gauge("flume_lanes", "Lanes to attention nodes.", supervisor.lanes)
    yield counter(
        "flume_kv_recomputed_tokens_total",
        "Tokens computed again, by why their KV was gone.",
        msgspec.structs.asdict(supervisor.recomputed),
        by="cause",
    )
    if supervisor.step_model is not None:
        yield from _step_model(supervisor.step_model)
    yield counter(
        "flume_logit_rows_read_total",
        "Tokens of captured steps for which the host had to read all logits: with penalties, a wide top-p …",
        supervisor.logit_rows_read,
    )
    yield engine_restarts(supervisor.engine_deaths)
    yield counter(
        "flume_requests_failed_total",
        "Requests that ended with an error here, by why; engine_lost: the router goes on elsewhere.",
        dict(supervisor.failed),
        by="reason",
    )
    yield epoch_rejected("weight", supervisor.epoch_rejected)
    yield from _routes(routes)


def _step_model(model: m.StepModel) -> Iterator[Metric]:
    yield gauge("flume_step_microbatches", "Parts that the last decode step ran in.", model.microbatches)
    yield gauge(
        "flume_step_model_error_ratio",
        "Mean distance of predicted steps of two microbatches from measured ones.",
        model.error_ratio,
    )
    yield gauge(
        "flume_step_model_bias_ratio", "The same with signs: positive: predicted too long.", model.bias_ratio
    )
    yield counter(
        "flume_step_model_comparisons_total",
        "How often one and two microbatches were compared.",
        model.comparisons,
    )


def _routes(routes: RouteWriter) -> Iterator[Metric]:
    yield gauge("flume_routes_pending", "Routes whose newest value is not in etcd yet.", routes.pending)
    yield counter(
        "flume_route_writes_refused_total",
        "Transactions that etcd refused: another epoch, or a key that has changed.",
        routes.refused,
    )
    yield counter(
        "flume_stray_routes_removed_total", "Keys of routes that belonged to no sequence.", routes.removed
    )
    yield counter(
        "flume_routes_taken_over_total", "Routes of ours that another node took over.", routes.taken_over
    )
