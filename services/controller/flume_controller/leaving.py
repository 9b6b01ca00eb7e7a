"""By when a node that leaves is to be empty, and whether that has passed. Pure.

The spec says it twice: when the wish was made and how long it gives. Within that time all that leave have
what remains of it. A node that has to leave later, as nobody looked or as one too many came back, has the
whole of it. Once a node was told, its own record counts.
"""

from __future__ import annotations

from dataclasses import replace

from flume_controller.plan import NodeView, Phase
from flume_controller.spec import AttentionSpec, Deadline

SKEW_S = 2.0
"""A node keeps time by its own clock: a smaller difference is none."""


def with_deadline(view: NodeView, spec: AttentionSpec, told_s: float, now_s: float) -> NodeView:
    """`view` with what `spec` says of its leaving. `told_s`: the node's own `leave_by_s`."""
    by_s = _by_s(view.id, spec, told_s, now_s)
    told = abs(by_s - told_s) <= SKEW_S and (by_s > 0) == (told_s > 0)
    overdue = view.phase is Phase.DRAINING and told and 0 < by_s <= now_s
    return replace(view, drained=view.id in spec.drained, leave_by_s=by_s, told=told, overdue=overdue)


def _by_s(node: str, spec: AttentionSpec, told_s: float, now_s: float) -> float:
    if node in spec.drained:
        deadline = spec.drain_deadlines.get(node)
        return _remaining(deadline, told_s, now_s) if deadline else 0.0
    # A later wish without a deadline is about the count: it takes back none that was given before.
    return _remaining(spec.scale_deadline, told_s, now_s) if spec.scale_deadline else told_s


def _remaining(deadline: Deadline, told_s: float, now_s: float) -> float:
    if now_s < deadline.by_s:
        return deadline.by_s
    return told_s or now_s + deadline.within_s
