"""What passes see that is worth telling people. Pure: two observations in, happenings out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flume_controller.events import EventType, Happening
from flume_controller.plan import Phase
from flume_controller.spec import AttentionSpec, Condition, ConditionStatus, GaveUp
from flume_controller.status import DISK_FULL, INVALID_SPEC

FLEET = "fleet/attention"

_GOING = (Phase.DRAINING, Phase.STOPPING)
_LOST = (Phase.LOST, Phase.STUCK, Phase.DEAD)


def of_scale(before: int, spec: AttentionSpec) -> list[Happening]:
    """The wish went from `before` to what `spec` says."""
    if spec.desired == before:
        return []
    reason = "ScalingUp" if spec.desired > before else "ScalingDown"
    message = f"from {before} to {spec.desired} attention nodes, set by {spec.set_by}"
    return [Happening(FLEET, EventType.NORMAL, reason, message)]


def of_conditions(before: Iterable[Condition], after: Iterable[Condition]) -> list[Happening]:
    """What turned for the worse or the better: requests can(not) be served, the spec can(not) be read."""
    earlier = {condition.type: condition for condition in before}
    found = (_of_condition(earlier.get(item.type), item) for item in after)
    return [happening for happening in found if happening is not None]


def _of_condition(before: Condition | None, after: Condition) -> Happening | None:
    if before is None or (before.status, before.reason) == (after.status, after.reason):
        return None
    if after.type == "Available" and after.status is ConditionStatus.TRUE:
        return Happening(FLEET, EventType.NORMAL, "Available", "requests can be served")
    if after.type == "Available" and after.reason != "ScaledToZero":
        return Happening(FLEET, EventType.WARNING, "Unavailable", f"{after.reason}: {after.message}")
    if after.type == "Degraded" and after.reason == INVALID_SPEC:
        return Happening(FLEET, EventType.WARNING, INVALID_SPEC, after.message)
    if after.type == "Degraded" and after.reason == DISK_FULL:
        return Happening(FLEET, EventType.WARNING, DISK_FULL, after.message)
    if after.type == "Degraded" and before.reason == DISK_FULL:
        return Happening(FLEET, EventType.NORMAL, "DiskHasRoom", "there is room on the disk again")
    if after.type == "Degraded" and before.reason == INVALID_SPEC:
        return Happening(FLEET, EventType.NORMAL, "ValidSpec", "the spec can be read again")
    return None


def of_giving_up(gave_up: GaveUp, deadline_s: float) -> Happening:
    message = (
        f"{gave_up.wanted} attention nodes were not ready within {deadline_s:g} s without progress, "
        f"returned to {gave_up.returned_to}"
    )
    return Happening(FLEET, EventType.WARNING, "ScaleTimedOut", message)


def of_store_replaced(reason: str, spec: AttentionSpec, *, restored: bool) -> Happening:
    """etcd came back as another one; `restored`: what it lacked was written again from memory."""
    how = (
        f"the spec ({spec.desired} attention nodes) and settings were written again as they were last seen"
        if restored
        else f"the spec ({spec.desired} attention nodes) and settings are as they are found there"
    )
    return Happening(
        FLEET, EventType.WARNING, "StoreReplaced", f"{reason or 'etcd is another one than before'}: {how}"
    )


def of_deadline(node: str, lost_tokens: int) -> Happening:
    message = f"still held {lost_tokens} tokens when its deadline passed; they are computed again elsewhere"
    return Happening(f"attention/{node}", EventType.WARNING, "DrainDeadlineExceeded", message)


def of_election(leader: str, epoch: int) -> Happening:
    return Happening(
        f"controller/{leader}", EventType.NORMAL, "LeaderElected", f"{leader} leads with epoch {epoch}"
    )


def of_nodes(before: Mapping[str, Phase], after: Mapping[str, Phase]) -> list[Happening]:
    """What became of each node between two passes."""
    found = (
        _of_node(node, before.get(node), after.get(node)) for node in sorted(before.keys() | after.keys())
    )
    return [happening for happening in found if happening is not None]


def _of_node(node: str, before: Phase | None, after: Phase | None) -> Happening | None:
    name = f"attention/{node}"
    if after is before:
        return None
    if after is Phase.READY:
        how = {
            Phase.DRAINING: "takes tails again",
            Phase.LOST: "is registered again",
            Phase.UNREACHABLE: "is reached again",
        }
        return Happening(name, EventType.NORMAL, "NodeReady", how.get(before or after, "is ready"))
    if after is Phase.DRAINING:
        return Happening(name, EventType.NORMAL, "NodeDraining", "takes no more tails")
    if after is Phase.UNREACHABLE:
        return Happening(name, EventType.WARNING, "NodeUnreachable", "no weight node has a lane to it")
    if after in _LOST and before not in _LOST:
        return _ended(name, before, after)
    if after is None:
        return _ended(name, before, after)
    return None


def _ended(name: str, before: Phase | None, after: Phase | None) -> Happening | None:
    if before in _LOST:
        return None  # told already
    if before in _GOING and after is not Phase.LOST:
        return Happening(name, EventType.NORMAL, "NodeStopped", "has stopped")
    how = {Phase.LOST: "runs but is not registered", Phase.STUCK: "did not register in time"}
    return Happening(name, EventType.WARNING, "NodeLost", how.get(after or Phase.DEAD, "has ended"))
