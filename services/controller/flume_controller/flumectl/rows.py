"""Messages of the admin API as rows: the field names of JSON output, and the columns of tables. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from flume_protos.v1 import admin_pb2, common_pb2

from flume_controller.flumectl.duration import format_age
from flume_controller.flumectl.output import Column, Row, column


def node_row(node: admin_pb2.Node) -> Row:
    return {
        "id": node.id,
        "role": node.role,
        "state": node.state,
        "pid": node.pid,
        "host": node.host,
        "address": node.address,
        "epoch": node.epoch,
        "kv_capacity_tokens": node.kv_capacity_tokens,
        "kv_used_tokens": node.kv_used_tokens,
        "sequences": node.sequences,
        "age_s": round(node.age_s, 1),
        "version": node.version,
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


def _ranges(row: Row) -> str:
    """`attention-1:0-128 attention-2:128-`: first token and the one after the last; the tail is open."""
    return " ".join(
        f"{item['node']}:{item['start']}-{'' if item['end'] is None else item['end']}"
        for item in row["ranges"]
    )


def _kv(row: Row) -> str:
    if row["role"] != "attention":
        return "-"
    return f"{row['kv_used_tokens']}/{row['kv_capacity_tokens']}"


def _age(row: Row) -> str:
    return format_age(row["age_s"])


NODE_COLUMNS: Sequence[Column] = (
    column("ID", "id"),
    column("ROLE", "role"),
    column("STATE", "state"),
    Column("KV-TOKENS", _kv),
    column("SEQUENCES", "sequences"),
    Column("AGE", _age),
    column("PID", "pid", wide=True),
    column("HOST", "host", wide=True),
    column("ADDRESS", "address", wide=True),
    column("EPOCH", "epoch", wide=True),
    column("VERSION", "version", wide=True),
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
