"""What is there: members, processes and node statistics put together. Pure.

A READY node that no weight node reaches is PREPARING while it joins, then UNREACHABLE (`reach.py`).

registered?  process?   ->  phase
yes          ended          DEAD: its lease has yet to run out
yes          told to end    STOPPING
yes          running/-      the member's own state
no           told to end    STOPPING
no           running        STARTING, or LOST once it had been registered; STUCK after too long
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from flume_common.membership import Member, State

from flume_controller.plan import NodeView, Phase
from flume_controller.providers.base import Instance
from flume_controller.reach import Answer, Reach

_PHASE = {State.PREPARING: Phase.PREPARING, State.READY: Phase.READY, State.DRAINING: Phase.DRAINING}


@dataclass(frozen=True, slots=True)
class Held:
    """What an attention node holds at this moment."""

    used_tokens: int
    sequences: int
    safe_to_delete: bool = False
    answer: Answer = Answer.YES

    @classmethod
    def of_member(cls, member: Member) -> Held:
        """From the member's own record, which may lag; for a node at whose address nothing listens."""
        return cls(
            member.kv_used_tokens,
            member.sequences,
            member.state is State.DRAINING and member.kv_used_tokens == 0 and member.sequences == 0,
            Answer.REFUSED,
        )


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a running process may be without a registration."""

    start_s: float = 120.0
    """Since its start. Loading and pinning memory lies within."""
    lost_s: float = 30.0
    """Since it was last seen registered. Longer than etcd's election and a renewed lease take."""


def observe(
    members: Iterable[Member],
    instances: Iterable[Instance],
    held: Mapping[str, Held],
    last_seen_s: Mapping[str, float],
    now_s: float,
    patience: Patience,
    reach: Mapping[str, Reach] = MappingProxyType({}),
) -> list[NodeView]:
    """One view per node, by id. `last_seen_s`: Unix time at which a node was last registered.

    `reach`: of registered nodes; one that is missing there counts as reached.
    """
    by_id = {member.id: member for member in members}
    processes = {instance.id: instance for instance in instances}
    views = []
    for node in sorted(by_id.keys() | processes.keys()):
        member, process = by_id.get(node), processes.get(node)
        if member is None and process is not None and not process.running:
            continue  # nothing is left of it
        phase = _phase(member, process, last_seen_s.get(node), now_s, patience)
        load = held.get(node) or _last_word(member)
        view = NodeView(node, phase, load.used_tokens, load.safe_to_delete, process is not None)
        views.append(_as_reached(view, reach.get(node, Reach.YES)))
    return views


def _as_reached(view: NodeView, reach: Reach) -> NodeView:
    """A node that nobody reaches is not READY, and its drain is not taken back."""
    if reach is Reach.YES:
        return view
    phase = view.phase
    if phase is Phase.READY:
        phase = Phase.PREPARING if reach is Reach.JOINING else Phase.UNREACHABLE
    replaceable = phase is Phase.UNREACHABLE and reach is Reach.OVERDUE
    return replace(view, phase=phase, reached=False, replaceable=replaceable)


def _last_word(member: Member | None) -> Held:
    """For a node that gave no answer in time: enough to order victims by, not to call it empty."""
    return Held(member.kv_used_tokens, member.sequences) if member else Held(0, 0)


def _phase(
    member: Member | None,
    process: Instance | None,
    last_seen_s: float | None,
    now_s: float,
    patience: Patience,
) -> Phase:
    if process is not None and not process.running:
        return Phase.DEAD
    if process is not None and process.stopping:
        return Phase.STOPPING
    if member is not None:
        return _PHASE[member.state]
    assert process is not None
    limit_s = process.started_at_s + patience.start_s
    if last_seen_s is not None:
        limit_s = max(limit_s, last_seen_s + patience.lost_s)
    if now_s >= limit_s:
        return Phase.STUCK
    return Phase.STARTING if last_seen_s is None else Phase.LOST


def free_ids(
    count: int, taken: Iterable[str], stem: str = "attention-", preferred: Iterable[str] = ()
) -> list[str]:
    """`count` node ids that are not taken: of the `preferred` ones first, then the lowest numbers."""
    used = set(taken)
    found = [name for name in dict.fromkeys(preferred) if name not in used][:count]
    used.update(found)
    number = 1
    while len(found) < count:
        if (name := f"{stem}{number}") not in used:
            found.append(name)
        number += 1
    return found
