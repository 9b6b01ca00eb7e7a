"""`flumectl describe`: one thing and what belongs to it, for people."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

import click
from flume_protos.v1 import admin_pb2

from flume_controller.flumectl import rows as r
from flume_controller.flumectl.activity import activity_line, activity_row
from flume_controller.flumectl.client import CALL_DEADLINE_S, Target, admin
from flume_controller.flumectl.complete import node_names
from flume_controller.flumectl.duration import format_age
from flume_controller.flumectl.options import target_options
from flume_controller.flumectl.output import Column, Row, Table, column, to_yaml
from flume_controller.flumectl.status import to_text

LANE_COLUMNS: Sequence[Column] = (
    column("WEIGHT-NODE", "weight_node"),
    column("EPOCH", "epoch"),
    column("SEQUENCES", "sequences"),
    column("RANGES", "ranges"),
    column("HELD-BLOCKS", "held_blocks"),
    column("GRANTED-BLOCKS", "granted_blocks"),
    column("HOP", "hop"),
)
FORMAT = click.option(
    "-o", "--output", "fmt", type=click.Choice(["text", "json", "yaml"]), default="text", show_default=True,
    help="Format.",
)  # fmt: skip


@click.group()
def describe() -> None:
    """Show one thing in full: what it is, what belongs to it, what happened to it."""


@describe.command()
@click.argument("id", metavar="NAME", shell_complete=node_names())
@FORMAT
@target_options
def node(target: Target, id: str, fmt: str) -> None:
    """Describe the node NAME: its lanes, routes and events.

    \b
    Examples:
      flumectl describe node attention-1
    """
    _show(target, "node", id, fmt)


@describe.command()
@click.argument("id", metavar="NAME")
@FORMAT
@target_options
def route(target: Target, id: str, fmt: str) -> None:
    """Describe the route of the sequence NAME: which node holds which tokens.

    \b
    Examples:
      flumectl describe route chatcmpl-1
    """
    _show(target, "route", id, fmt)


@describe.command()
@click.argument("id", metavar="NAME")
@FORMAT
@target_options
def request(target: Target, id: str, fmt: str) -> None:
    """Describe the request NAME: how far it is and where its tokens are.

    \b
    Examples:
      flumectl describe request chatcmpl-1 -o json
    """
    _show(target, "request", id, fmt)


@describe.command()
@FORMAT
@target_options
def cluster(target: Target, fmt: str) -> None:
    """Describe the cluster: conditions, nodes, settings that are set, events.

    \b
    Examples:
      flumectl describe cluster
    """
    _show(target, "cluster", "", fmt)


def _show(target: Target, kind: str, name: str, fmt: str) -> None:
    with admin(target) as stub:
        request = admin_pb2.DescribeObjectRequest(kind=kind, name=name)
        reply = stub.Describe(request, timeout=CALL_DEADLINE_S)
    described = as_row(kind, reply)
    if fmt == "json":
        click.echo(json.dumps(described, indent=2, ensure_ascii=False))
    elif fmt == "yaml":
        click.echo(to_yaml(described))
    else:
        click.echo(as_text(kind, described, time.time()))


def as_row(kind: str, reply: admin_pb2.DescribeObjectReply) -> dict[str, Any]:
    """What JSON shows. Pure."""
    row: dict[str, Any] = {"kind": kind}
    if kind == "cluster":
        row |= {"status": r.status_row(reply.status), "spec_revision": reply.spec_revision}
        row["settings"] = [r.setting_row(item) for item in reply.settings]
    row["nodes"] = [r.node_row(item) for item in reply.nodes]
    if kind != "cluster":
        row["routes"] = [r.route_row(item) for item in reply.routes]
        row["requests"] = [r.request_row(item) for item in reply.requests]
        row["unanswered"] = list(reply.unanswered)
    if kind == "node":
        row["lanes"] = [r.lane_row(item) for item in reply.lanes]
        if reply.activity.node:
            row["activity"] = activity_row(reply.activity)
    row["events"] = [r.event_row(item) for item in reply.events]
    return row


def as_text(kind: str, row: Row, now_s: float) -> str:
    """For people. Pure but for the ages of events."""
    return "\n".join([*HEADS[kind](row, now_s), *_events(row["events"])])


def _node(row: Row, now_s: float) -> list[str]:
    (node,) = row["nodes"]
    fields = {
        "Name": node["id"],
        "Role": node["role"],
        "State": f"{node['state']} ({node['reason']})" if node["reason"] else node["state"],
        "Address": node["address"] or "<none>",
        "Metrics": f"http://{node['metrics_address']}/metrics" if node["metrics_address"] else "<none>",
        "Host": f"{node['host'] or '<unknown>'}, pid {node['pid']}",
        "Epoch": node["epoch"],
        "Version": node["version"] or "<unknown>",
        "Age": format_age(node["age_s"]),
        "Sequences": node["sequences"],
    }
    if node["role"] == "attention":
        fields["KV"] = f"{node['kv_used_tokens']} of {node['kv_capacity_tokens']} tokens"
    if "activity" in row:
        fields["Doing"] = activity_line(row["activity"]).partition(": ")[2]
    if node["engine_deaths"]:
        ago = format_age(now_s - (node["last_engine_death_s"] or now_s))
        fields["Engine deaths"] = f"{node['engine_deaths']}, the last {ago} ago: {node['last_engine_error']}"
    if node["model_failures"]:
        fields["Bad output"] = f"{node['model_failures']} requests, the last: {node['last_model_failure']}"
    if node["state"] == "DRAINING":
        by_s = node["leave_by_s"]
        fields["Leaves"] = "once it is empty" if by_s is None else f"in {r.leaves_in(by_s)}, empty or not"
    return [
        *_fields(fields),
        *_section("Lanes", row["lanes"], LANE_COLUMNS),
        *_requests(row),
        *_section("Routes", row["routes"], r.ROUTE_COLUMNS),
    ]


def _requests(row: Row) -> list[str]:
    if row["unanswered"]:
        return [f"{'Requests:':<14} <unknown: the node did not answer in time>"]
    return _section("Requests", row["requests"], r.REQUEST_COLUMNS)


def _sequence(row: Row, now_s: float) -> list[str]:
    lines = []
    for item in row["requests"]:
        lines += _fields(
            {
                "Name": item["id"],
                "State": item["state"],
                "Weight node": item["weight_node"],
                "Tokens": f"{item['prompt_tokens']} prompt, {item['completion_tokens']} completion",
                "Age": format_age(item["age_s"]),
            }
        )
    for item in row["routes"]:
        if not row["requests"]:
            lines += _fields({"Name": item["sequence"], "Weight node": item["weight_node"]})
        lines += _fields({"Route epoch": item["epoch"]})
        lines += _section("Ranges", item["ranges"], RANGE_COLUMNS)
    return [*lines, *_section("Nodes", row["nodes"], r.NODE_COLUMNS)]


def _cluster(row: Row, now_s: float) -> list[str]:
    return [
        to_text(row["status"], now_s),
        *_section("Nodes", row["nodes"], r.NODE_COLUMNS),
        *_section("Settings", row["settings"], r.SETTING_COLUMNS),
    ]


HEADS = {"node": _node, "route": _sequence, "request": _sequence, "cluster": _cluster}
RANGE_COLUMNS: Sequence[Column] = (
    column("NODE", "node"),
    column("START", "start"),
    Column("END", lambda item: "tail" if item["end"] is None else str(item["end"])),
    Column("TOKENS", lambda item: "-" if item["end"] is None else str(item["end"] - item["start"])),
)


def _fields(fields: dict[str, Any]) -> list[str]:
    return [f"{f'{name}:':<14} {value}" for name, value in fields.items()]


def _section(title: str, rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    if not rows:
        return [f"{f'{title}:':<14} <none>"]
    return [f"{title}:", *_indented(Table(columns, wide=False).lines(rows))]


def _events(rows: Sequence[Row]) -> list[str]:
    return _section("Events", rows, [item for item in r.EVENT_COLUMNS if item.title != "OBJECT"])


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]
