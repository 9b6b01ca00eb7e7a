"""What passes see that is worth telling people. Pure: two observations in, happenings out."""

from __future__ import annotations

from collections.abc import Mapping

from flume_controller.events import EventType, Happening
from flume_controller.plan import Phase
from flume_controller.spec import AttentionSpec, GaveUp

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


def of_giving_up(gave_up: GaveUp, deadline_s: float) -> Happening:
    message = (
        f"{gave_up.wanted} attention nodes were not ready within {deadline_s:g} s without progress, "
        f"returned to {gave_up.returned_to}"
    )
    return Happening(FLEET, EventType.WARNING, "ScaleTimedOut", message)


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
        how = {Phase.DRAINING: "takes tails again", Phase.LOST: "is registered again"}
        return Happening(name, EventType.NORMAL, "NodeReady", how.get(before or after, "is ready"))
    if after is Phase.DRAINING:
        return Happening(name, EventType.NORMAL, "NodeDraining", "takes no more tails")
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
