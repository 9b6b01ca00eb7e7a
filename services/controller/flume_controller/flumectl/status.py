"""`flumectl status`: desired and actual, and whether all is well."""

from __future__ import annotations

import time

import click
from flume_protos.v1 import admin_pb2

from flume_controller.flumectl.activity import activity_line
from flume_controller.flumectl.client import CALL_DEADLINE_S, Target, admin
from flume_controller.flumectl.duration import format_age
from flume_controller.flumectl.options import output_option, target_options
from flume_controller.flumectl.output import Column, Row, Table, column, render_one
from flume_controller.flumectl.rows import leaves_in, status_row


@click.command()
@output_option
@click.option("-w", "--watch", is_flag=True, help="Go on and print every change.")
@target_options
def status(target: Target, fmt: str, watch: bool) -> None:
    """Show the cluster: nodes wanted and there, and the conditions Available, Progressing and Degraded.

    \b
    Examples:
      flumectl status
      flumectl status -o json
      flumectl status -w
    """
    request = admin_pb2.StatusRequest(watch=watch)
    with admin(target) as stub:
        for reply in stub.Status(request, timeout=None if watch else CALL_DEADLINE_S):
            row = {**status_row(reply), **_local_row(target)}
            click.echo(_render(row, fmt, time.time(), stream=watch))


def _local_row(target: Target) -> Row:
    """What only this machine can tell; nothing of a cluster that was named by --server."""
    if target.server:
        return {}
    found = target.local()
    local = {"supervision": found.supervision.value, "pid": found.pid, "troubles": found.troubles}
    return {"local": local}


def _render(row: Row, fmt: str, now_s: float, *, stream: bool) -> str:
    if fmt in ("table", "wide"):
        return to_text(row, now_s) + ("\n" if stream else "")
    if fmt == "json" and not stream:
        import json

        return json.dumps(row, indent=2, ensure_ascii=False)
    text = render_one(row, (), fmt, Table((), wide=False))
    return text if stream else text.removeprefix("---\n")


def to_text(row: Row, now_s: float) -> str:
    """For people. Pure."""
    attention = row["attention"]
    stale = row["observed_generation"] < row["generation"]
    counts = ", ".join(f"{attention[key]} {key}" for key in ("desired", "ready", "preparing", "draining"))
    lines = [
        f"Cluster:       {row['cluster']}",
        f"Model:         {row['model'] or '<none>'}",
        f"Attention:     {counts}" + (" (the controller has yet to act on the last change)" if stale else ""),
        f"Set by:        {row['set_by'] or '<unknown>'}; autoscaling {_autoscale(row['autoscale'])}",
        *([f"Drained:       {', '.join(row['drained'])}"] if row["drained"] else ()),
        *([f"Leaving:       {', '.join(map(_leaving, row['leaving']))}"] if row["leaving"] else ()),
        f"Controller:    {row['leader'] or '<none>'} leads",
        f"Weight nodes:  {row['weight_nodes']}",
        *(f"  {line}" for line in _activity(row)),
        f"Routers:       {row['routers']}",
        f"Store:         {_store(row, now_s)}",
        *_local_lines(row.get("local")),
        "",
    ]
    columns = (
        column("CONDITION", "type"),
        column("STATUS", "status"),
        column("REASON", "reason"),
        Column("SINCE", lambda item: format_age(now_s - item["last_transition_time_s"])),
        column("MESSAGE", "message"),
    )
    return "\n".join([*lines, *Table(columns, wide=False).lines(row["conditions"])])


def _store(row: Row, now_s: float) -> str:
    state = "connected" if row["store_connected"] else "unreachable, last known state shown"
    if (incarnation := row.get("incarnation")) is None:
        return state
    why = f", since {format_age(now_s - incarnation['since_s'])}: {incarnation['reason']}"
    return f"{state}, incarnation {incarnation['id'][:8]}" + (why if incarnation["reason"] else "")


def _activity(row: Row) -> list[str]:
    silent = [f"{node}: did not answer in time" for node in row.get("unanswered", ())]
    return [activity_line(item) for item in row.get("activity", ())] + silent


def _local_lines(local: Row | None) -> list[str]:
    if local is None:
        return []
    by = f"by `flumectl up` (pid {local['pid']})" if local["pid"] else "by nobody"
    return [f"Supervised:    {by}", *(f"Trouble:       {trouble}" for trouble in local["troubles"])]


def _leaving(row: Row) -> str:
    return f"{row['node']} in {leaves_in(row['leave_by_s'])}"


def _autoscale(row: Row) -> str:
    if not row["enabled"]:
        return "off"
    bounds = f"{row['min']} to {row['max']} nodes"
    return f"paused, as the number was set by hand ({bounds})" if row["paused"] else bounds
