"""What can be used of a spec that is not valid as a whole. Pure.

A hand that writes `spec/attention` may make any mistake. Meanwhile the nodes stay as they are, and a scale
writes a whole spec again: on the fields that are valid by themselves, else on what the status says.
"""

from __future__ import annotations

from typing import Any

import msgspec

from flume_controller.spec import MAX_ATTENTION_NODES, AttentionSpec, AttentionStatus

_BOUNDS = ("min", "max")
_KEPT = ("set_by", "updated_at_s", "autoscale", "scale_deadline", "drained", "drain_deadlines")


def salvaged(value: bytes, status: AttentionStatus | None, num_running: int = 0) -> AttentionSpec:
    """A valid spec that asks for what is there: the count of `status`, `num_running` without one.

    Its generation is at least the one that was last acted on.
    """
    fields = _valid_fields(value)
    known = status.observed_generation if status else 1
    generation = max(fields.get("generation", 1), known, 1)
    desired = min(status.desired if status else num_running, MAX_ATTENTION_NODES)
    kept = {name: fields[name] for name in _KEPT if name in fields}
    bounds = {name: fields[name] for name in _BOUNDS if name in fields}
    for extra in ({**kept, **bounds}, kept):
        try:
            return AttentionSpec(desired=desired, generation=generation, **extra)
        except ValueError:  # the bounds are crossed, or leave the count out
            continue
    return AttentionSpec(desired=desired, generation=generation)


def _valid_fields(value: bytes) -> dict[str, Any]:
    """Those that have the type and the range of their field."""
    try:
        raw = msgspec.json.decode(value)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return {}
    if not isinstance(raw, dict):
        return {}
    found: dict[str, Any] = {}
    for field in msgspec.structs.fields(AttentionSpec):
        try:
            found[field.name] = msgspec.convert(raw[field.name], field.type)
        except (KeyError, msgspec.ValidationError):
            continue
    return found
