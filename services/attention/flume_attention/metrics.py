"""The node as Prometheus sees it: its engine's newest report.

Counters are the engine's, so they begin at 0 with a new one.
"""

from __future__ import annotations

from collections.abc import Iterator

from flume_common.metrics import counter, engine_restarts, epoch_rejected, gauge, node_state
from prometheus_client import Metric

from flume_attention.claims import REASONS, Claims
from flume_attention.messages import Report
from flume_attention.supervisor import Supervisor


def families(supervisor: Supervisor, claims: Claims | None = None) -> Iterator[Metric]:
    """Safe to read from another thread: a report is replaced, never altered."""
    report = supervisor.report
    yield node_state(supervisor.state)
    yield engine_restarts(supervisor.engine_deaths)
    yield from _memory(report)
    yield from _lanes(report)
    yield counter(
        "flume_kv_pulled_tokens_total", "Tokens read from other attention nodes.", report.pulled_tokens
    )
    yield counter(
        "flume_kv_pulls_refused_total",
        "Reads by other attention nodes of ranges that were not here any more.",
        report.pulls_refused,
    )
    yield epoch_rejected("attention", report.epoch_rejected + (claims.stale if claims else 0))
    yield counter(
        "flume_claims_refused_total",
        "Control messages whose sender or epoch etcd did not confirm.",
        dict(claims.refused) if claims else dict.fromkeys(REASONS, 0),
        by="reason",
    )


def _memory(report: Report) -> Iterator[Metric]:
    yield gauge(
        "flume_kv_capacity_tokens",
        "Tokens for which there is memory; 0 before a weight node has brought its layout.",
        report.capacity_tokens,
    )
    yield gauge("flume_kv_used_tokens", "Tokens that are held, orphans among them.", report.used_tokens)
    yield gauge(
        "flume_kv_cache_usage_ratio",
        "Blocks that are held, of all; 0 before there are any.",
        report.used_blocks / max(report.capacity_blocks, 1),
    )
    yield gauge(
        "flume_kv_blocks",
        "Blocks of KV memory: held, promised to weight nodes and not used yet, and neither.",
        blocks(report),
        by="state",
    )
    yield gauge(
        "flume_kv_orphan_tokens",
        "Tokens that weight nodes left when they died, kept for others to take over.",
        report.orphan_tokens,
    )


def blocks(report: Report) -> dict[str, int]:
    """All blocks by what they are: `used`, `granted` or `free`."""
    granted = sum(lane.granted_blocks - lane.held_blocks for lane in report.lanes)
    free = report.capacity_blocks - report.used_blocks - granted
    return {"used": report.used_blocks, "granted": granted, "free": free}


def _lanes(report: Report) -> Iterator[Metric]:
    lanes = report.lanes
    yield gauge("flume_lanes", "Lanes to weight nodes.", len(lanes))
    yield gauge(
        "flume_sequences_held", "Sequences of which a lane has a part here.", sum(x.sequences for x in lanes)
    )
    yield gauge("flume_ranges_held", "Token ranges of lanes.", sum(lane.ranges for lane in lanes))
