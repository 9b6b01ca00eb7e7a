"""What weight nodes are doing, in a row for programs and a line for people. Pure."""

from __future__ import annotations

from flume_protos.v1 import weight_pb2

from flume_controller.flumectl.duration import format_age
from flume_controller.flumectl.output import Row

_QUIET_S = 5.0  # no progress for so long is worth a word


def activity_row(status: weight_pb2.WeightStatusReply) -> Row:
    engine = status.engine
    return {
        "node": status.node,
        "working": status.working,
        "activity": engine.activity if status.HasField("engine") else None,
        "activity_s": round(engine.activity_s, 1),
        "quiet_s": round(engine.quiet_s, 1),
        "done": engine.done,
        "total": engine.total,
        "step": engine.step,
        "step_prefill_tokens": engine.prefill_tokens,
        "awaits_node": engine.awaits_node,
        "queued": status.queued,
        "prefilling": status.prefilling,
        "decoding": status.decoding,
        "paused": status.paused,
        "prefill_computed_tokens": status.prefill_computed_tokens,
        "prefill_total_tokens": status.prefill_total_tokens,
    }


def activity_line(row: Row) -> str:
    """`weight-1: prefills 1, decodes 2; 3200 of 5600 prompt tokens; step 41 for 23s, layer 12 of 30`."""
    parts = [_sequences(row), _prompts(row), _engine(row)]
    if row["quiet_s"] >= _QUIET_S:
        parts.append(f"no progress for {format_age(row['quiet_s'])}")
    return f"{row['node']}: {'; '.join(part for part in parts if part)}"


def _sequences(row: Row) -> str:
    counts = (
        ("prefills", row["prefilling"]), ("decodes", row["decoding"]), ("queued", row["queued"]),
        ("paused", row["paused"]),
    )  # fmt: skip
    return ", ".join(f"{name} {count}" for name, count in counts if count)


def _prompts(row: Row) -> str:
    if not row["prefill_total_tokens"]:
        return ""
    return f"{row['prefill_computed_tokens']} of {row['prefill_total_tokens']} prompt tokens"


def _engine(row: Row) -> str:
    lasts = format_age(row["activity_s"])
    match row["activity"]:
        case None:
            return "starts its engine"
        case "STARTING":
            return f"its engine starts, for {lasts}"
        case "LOADING":
            percent = f" {100 * row['done'] // row['total']} %" if row["total"] else ""
            return f"loads its model,{percent} after {lasts}"
        case "PREPARING":
            return f"prepares steps, for {lasts}"
        case "STEPPING":
            waits = ", waits for an attention node" if row["awaits_node"] else ""
            layer = min(row["done"] + 1, row["total"])
            return f"step {row['step']} for {lasts}, layer {layer} of {row['total']}{waits}"
        case _:
            return "" if _sequences(row) else "idle"
