"""`flumectl top`: what is fullest and what is fastest, measured over a moment."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import click
from flume_protos.v1 import admin_pb2

from flume_controller.flumectl.client import CALL_DEADLINE_S, Target, admin
from flume_controller.flumectl.duration import DURATION
from flume_controller.flumectl.options import output_option, target_options
from flume_controller.flumectl.output import Row, render
from flume_controller.flumectl.rows import (
    TOP_NODE_COLUMNS,
    TOP_REQUEST_COLUMNS,
    top_node_row,
    top_request_row,
)

interval_option = click.option(
    "--interval", "interval_s", type=DURATION, default="1s", show_default=True,
    help="Over how long tokens per second are measured.",
)  # fmt: skip
watch_option = click.option("-w", "--watch", is_flag=True, help="Go on, one table after each interval.")


@click.group()
def top() -> None:
    """Show what uses most."""


@top.command()
@output_option
@interval_option
@watch_option
@target_options
def nodes(target: Target, fmt: str, interval_s: float, watch: bool) -> None:
    """List attention nodes, the fullest first, and how fast they fill.

    \b
    Examples:
      flumectl top nodes
      flumectl top nodes -w --interval 5s
    """
    with admin(target) as stub:
        before = _node_list(stub)
        while True:
            time.sleep(interval_s)
            now = _node_list(stub)
            click.echo(render(node_rates(before, now, interval_s), TOP_NODE_COLUMNS, fmt))
            if not watch:
                return
            before = now


@top.command()
@output_option
@interval_option
@watch_option
@target_options
def requests(target: Target, fmt: str, interval_s: float, watch: bool) -> None:
    """List running requests, those with most tokens first, and how fast they get more.

    \b
    Examples:
      flumectl top requests
      flumectl top requests -o json --interval 3s
    """
    with admin(target) as stub:
        before = _request_list(stub)
        while True:
            time.sleep(interval_s)
            now = _request_list(stub)
            click.echo(render(request_rates(before, now, interval_s), TOP_REQUEST_COLUMNS, fmt))
            if not watch:
                return
            before = now


def _node_list(stub: Any) -> dict[str, admin_pb2.Node]:
    reply = stub.ListNodes(admin_pb2.ListNodesRequest(), timeout=CALL_DEADLINE_S)
    return {node.id: node for node in reply.nodes if node.role == "attention"}


def _request_list(stub: Any) -> dict[str, admin_pb2.Request]:
    reply = stub.ListRequests(admin_pb2.ListRequestsRequest(), timeout=CALL_DEADLINE_S)
    if reply.unanswered:
        click.echo(f"Warning: {', '.join(reply.unanswered)} did not answer in time", err=True)
    return {item.id: item for item in reply.requests}


def node_rates(
    before: Mapping[str, admin_pb2.Node], now: Mapping[str, admin_pb2.Node], interval_s: float
) -> list[Row]:
    """One row per node, the fullest first. A node that is new has no rate. Pure."""
    rows = [
        top_node_row(node, _rate(before.get(id), node, "kv_used_tokens", interval_s))
        for id, node in now.items()
    ]
    return sorted(rows, key=lambda row: -row["kv_used_ratio"])


def request_rates(
    before: Mapping[str, admin_pb2.Request], now: Mapping[str, admin_pb2.Request], interval_s: float
) -> list[Row]:
    """One row per request, the longest first. A request that is new has no rate. Pure."""
    rows = [
        top_request_row(item, _rate(before.get(id), item, "completion_tokens", interval_s))
        for id, item in now.items()
    ]
    return sorted(rows, key=lambda row: -row["tokens"])


def _rate(before: Any, now: Any, field: str, interval_s: float) -> float | None:
    if before is None or interval_s <= 0:
        return None
    grown: int = getattr(now, field) - getattr(before, field)
    return round(grown / interval_s, 1)
