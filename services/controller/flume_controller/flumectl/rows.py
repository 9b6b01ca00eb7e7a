"""Messages of the admin API as rows: the field names of JSON output, and the columns of tables.

Pure, but for ages of what is given as a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from flume_protos.v1 import admin_pb2, attention_pb2, common_pb2

from flume_controller.flumectl.activity import activity_row
from flume_controller.flumectl.duration import format_age
from flume_controller.flumectl.output import Column, Row, column


def node_row(node: admin_pb2.Node) -> Row:
    return {
        "id": node.id,
        "role": node.role,
        "state": node.state,
        "reason": node.reason or None,
        "pid": node.pid,
        "host": node.host,
        "address": node.address,
        "metrics_address": node.metrics_address or None,
        "epoch": node.epoch,
        "kv_capacity_tokens": node.kv_capacity_tokens,
        "kv_used_tokens": node.kv_used_tokens,
        "sequences": node.sequences,
        "age_s": round(node.age_s, 1),
        "version": node.version,
        "leave_by_s": node.leave_by_s or None,
        "engine_deaths": node.engine_deaths,
        "last_engine_error": node.last_engine_error or None,
        "last_engine_death_s": node.last_engine_death_s or None,
        "model_failures": node.model_failures,
        "last_model_failure": node.last_model_failure or None,
    }


def route_row(route: common_pb2.Route) -> Row:
    return {
        "sequence": route.sequence,
        "weight_node": route.weight_node,
        "epoch": route.epoch,
        "ranges": [
            {"start": item.start, "end": item.end if item.HasField("end") else None, "node": item.node}
            for item in route.ranges
        ],
    }


def request_row(request: admin_pb2.Request) -> Row:
    return {
        "id": request.id,
        "state": request.state,
        "weight_node": request.weight_node,
        "prompt_tokens": request.prompt_tokens,
        "completion_tokens": request.completion_tokens,
        "age_s": round(request.age_s, 1),
    }


def status_row(status: admin_pb2.StatusReply) -> Row:
    row = _cluster_row(status)
    if status.HasField("incarnation"):
        now = status.incarnation
        row = {**row, "incarnation": {"id": now.id, "since_s": now.since_s, "reason": now.reason}}
    if not (status.activity or status.unanswered):  # a controller of an older version says neither
        return row
    activity = [activity_row(item) for item in status.activity]
    return {**row, "activity": activity, "unanswered": list(status.unanswered)}


def _cluster_row(status: admin_pb2.StatusReply) -> Row:
    return {
        "cluster": status.cluster,
        "model": status.model,
        "attention": {
            "desired": status.desired,
            "ready": status.ready,
            "preparing": status.preparing,
            "draining": status.draining,
        },
        "generation": status.generation,
        "observed_generation": status.observed_generation,
        "set_by": status.set_by,
        "bounds": {"min": status.min, "max": status.max},
        "autoscale": {
            "enabled": status.autoscale.enabled,
            "paused": status.autoscale.paused,
            "min": status.autoscale.min,
            "max": status.autoscale.max,
        },
        "drained": list(status.drained),
        "leaving": [{"node": item.node, "leave_by_s": item.by_s} for item in status.leaving],
        "leader": status.leader,
        "weight_nodes": status.weight_nodes,
        "routers": status.routers,
        "store_connected": status.store_connected,
        "conditions": [
            {
                "type": item.type,
                "status": item.status,
                "reason": item.reason,
                "message": item.message,
                "last_transition_time_s": item.last_transition_time_s,
            }
            for item in status.conditions
        ],
    }


def event_row(event: admin_pb2.Event) -> Row:
    return {
        "id": event.id,
        "object": event.object,
        "type": event.type,
        "reason": event.reason,
        "message": event.message,
        "source": event.source,
        "count": event.count,
        "first_s": event.first_s,
        "last_s": event.last_s,
    }


def lane_row(lane: attention_pb2.LaneStats) -> Row:
    return {
        "weight_node": lane.weight_node,
        "epoch": lane.epoch,
        "sequences": lane.sequences,
        "ranges": lane.ranges,
        "held_blocks": lane.held_blocks,
        "granted_blocks": lane.granted_blocks,
        "steps": lane.steps,
        "hop": "direct" if lane.direct else "frames",
    }


def setting_row(setting: admin_pb2.Setting) -> Row:
    return {
        "name": setting.name,
        "value": setting.value if setting.HasField("value") else None,
        "default": setting.default,
        "error": setting.error,
        "type": setting.type,
        "range": setting.range,
        "unit": setting.unit,
        "description": setting.description,
        "readers": list(setting.readers),
        "scopes": list(setting.scopes),
        "revision": setting.revision,
        "set_by": setting.set_by,
        "set_at_s": setting.set_at_s,
    }


def change_row(change: admin_pb2.SettingChange) -> Row:
    return {
        "name": change.name,
        "before": change.before if change.HasField("before") else None,
        "after": change.after if change.HasField("after") else None,
    }


def record_row(record: admin_pb2.ConfigRecord) -> Row:
    return {
        "value": record.value if record.HasField("value") else None,
        "previous": record.previous if record.HasField("previous") else None,
        "set_by": record.set_by,
        "set_at_s": record.set_at_s,
    }


def top_node_row(node: admin_pb2.Node, tokens_per_s: float | None) -> Row:
    """`tokens_per_s`: by which what it holds grows; None: not known."""
    return {
        "id": node.id,
        "state": node.state,
        "kv_used_tokens": node.kv_used_tokens,
        "kv_capacity_tokens": node.kv_capacity_tokens,
        "kv_used_ratio": round(node.kv_used_tokens / max(node.kv_capacity_tokens, 1), 4),
        "sequences": node.sequences,
        "tokens_per_s": tokens_per_s,
    }


def top_request_row(request: admin_pb2.Request, tokens_per_s: float | None) -> Row:
    """`tokens_per_s`: of the answer; None: not known."""
    return {
        "id": request.id,
        "state": request.state,
        "weight_node": request.weight_node,
        "tokens": request.prompt_tokens + request.completion_tokens,
        "tokens_per_s": tokens_per_s,
        "age_s": round(request.age_s, 1),
    }


def _ranges(row: Row) -> str:
    """`attention-1:0-128 attention-2:128-`: first token and the one after the last; the tail is open."""
    return " ".join(
        f"{item['node']}:{item['start']}-{'' if item['end'] is None else item['end']}"
        for item in row["ranges"]
    )


def _state(row: Row) -> str:
    return f"{row['state']} ({row['reason']})" if row["reason"] else str(row["state"])


def _kv(row: Row) -> str:
    if row["role"] != "attention":
        return "-"
    return f"{row['kv_used_tokens']}/{row['kv_capacity_tokens']}"


def _age(row: Row) -> str:
    return format_age(row["age_s"])


def leaves_in(leave_by_s: float) -> str:
    """What is left until a Unix time."""
    return format_age(leave_by_s - time.time())


def _leaves_in(row: Row) -> str:
    return "-" if row["leave_by_s"] is None else leaves_in(row["leave_by_s"])


NODE_COLUMNS: Sequence[Column] = (
    column("ID", "id"),
    column("ROLE", "role"),
    Column("STATE", _state),
    Column("KV-TOKENS", _kv),
    column("SEQUENCES", "sequences"),
    Column("AGE", _age),
    column("PID", "pid", wide=True),
    column("HOST", "host", wide=True),
    column("ADDRESS", "address", wide=True),
    column("EPOCH", "epoch", wide=True),
    column("VERSION", "version", wide=True),
    Column("LEAVES-IN", _leaves_in, wide=True),
    Column("METRICS", lambda row: row["metrics_address"] or "-", wide=True),
)
ROUTE_COLUMNS: Sequence[Column] = (
    column("SEQUENCE", "sequence"),
    column("WEIGHT-NODE", "weight_node"),
    Column("RANGES", _ranges),
    column("EPOCH", "epoch", wide=True),
)
REQUEST_COLUMNS: Sequence[Column] = (
    column("ID", "id"),
    column("STATE", "state"),
    column("WEIGHT-NODE", "weight_node"),
    column("PROMPT", "prompt_tokens"),
    column("COMPLETION", "completion_tokens"),
    Column("AGE", _age),
)


def _rate(row: Row) -> str:
    return "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.1f}"


def _value(row: Row) -> str:
    return str(row["default"] if row["value"] is None else row["value"])


def _source(row: Row) -> str:
    if row["error"]:
        return "invalid"
    return "default" if row["value"] is None else "set"


def _set_since(row: Row) -> str:
    return since(row["set_at_s"]) if row["set_by"] else "-"


def _seen(row: Row) -> str:
    if row["count"] < 2:
        return since(row["last_s"])
    return f"{since(row['last_s'])} (x{row['count']} over {format_age(row['last_s'] - row['first_s'])})"


def since(time_s: float) -> str:
    """The age of a Unix time."""
    return format_age(time.time() - time_s)


EVENT_COLUMNS: Sequence[Column] = (
    Column("LAST-SEEN", _seen),
    column("TYPE", "type"),
    column("REASON", "reason"),
    column("OBJECT", "object"),
    column("SOURCE", "source", wide=True),
    column("MESSAGE", "message"),
)
SETTING_COLUMNS: Sequence[Column] = (
    column("NAME", "name"),
    Column("VALUE", _value),
    Column("SOURCE", _source),
    column("UNIT", "unit"),
    column("RANGE", "range", wide=True),
    Column("READ-BY", lambda row: ",".join(row["readers"]) or "<none>", wide=True),
    column("SET-BY", "set_by", wide=True),
    Column("AGE", _set_since, wide=True),
    column("DESCRIPTION", "description", wide=True),
)
CHANGE_COLUMNS: Sequence[Column] = (
    column("NAME", "name"),
    column("BEFORE", "before"),
    column("AFTER", "after"),
)
RECORD_COLUMNS: Sequence[Column] = (
    Column("AGE", lambda row: since(row["set_at_s"])),
    column("VALUE", "value"),
    column("PREVIOUS", "previous"),
    column("SET-BY", "set_by"),
)
TOP_NODE_COLUMNS: Sequence[Column] = (
    column("ID", "id"),
    column("STATE", "state"),
    Column("KV-USED", lambda row: f"{row['kv_used_ratio']:.0%}"),
    column("TOKENS", "kv_used_tokens"),
    column("CAPACITY", "kv_capacity_tokens"),
    column("SEQUENCES", "sequences"),
    Column("TOKENS/S", _rate),
)
TOP_REQUEST_COLUMNS: Sequence[Column] = (
    column("ID", "id"),
    column("STATE", "state"),
    column("WEIGHT-NODE", "weight_node"),
    column("TOKENS", "tokens"),
    Column("TOKENS/S", _rate),
    Column("AGE", _age),
)
