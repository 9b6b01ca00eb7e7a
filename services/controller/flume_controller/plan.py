"""Decide what to change so that the attention nodes match the spec. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """Where an attention node is in its life, as one pass of the controller sees it.

    STARTING -> PREPARING -> READY <-> DRAINING -> STOPPING -> (gone)
                               LOST: runs, but its registration has lapsed
                               UNREACHABLE: READY by its own word, but no weight node has a lane to it
    STUCK: started or lost too long ago    DEAD: the process has ended, its registration lingers
    """

    STARTING = "STARTING"  # a process that has not registered yet
    PREPARING = "PREPARING"
    READY = "READY"
    DRAINING = "DRAINING"
    STOPPING = "STOPPING"  # told to end, not gone yet
    LOST = "LOST"
    UNREACHABLE = "UNREACHABLE"
    STUCK = "STUCK"
    DEAD = "DEAD"


# The order in which nodes leave: none of the ready ones goes while one that serves nobody stays.
_STAYING = (Phase.STARTING, Phase.PREPARING, Phase.READY)


@dataclass(frozen=True, slots=True)
class NodeView:
    """One attention node as observed."""

    id: str
    phase: Phase
    held_tokens: int = 0
    safe_to_delete: bool = False  # DRAINING and holds nothing
    managed: bool = True  # this controller's provider runs it, and so can stop it
    drained: bool = False  # an operator wants this very node to go
    leave_by_s: float = 0.0  # Unix time at which it is to be gone if it leaves; 0: once it is empty
    told: bool = True  # a DRAINING one knows of `leave_by_s`
    overdue: bool = False  # DRAINING, and that time has passed
    reached: bool = True  # as far as is known
    replaceable: bool = False  # UNREACHABLE for so long that another one should take its place


@dataclass(frozen=True, slots=True)
class Start:
    count: int


@dataclass(frozen=True, slots=True)
class Drain:
    node: str
    leave_by_s: float = 0.0  # as in NodeView


@dataclass(frozen=True, slots=True)
class Undrain:
    node: str


@dataclass(frozen=True, slots=True)
class Stop:
    node: str
    lost_tokens: int = 0  # held past its deadline, and now to be computed again elsewhere


Action = Start | Drain | Undrain | Stop


def plan(desired: int, nodes: Sequence[NodeView]) -> list[Action]:
    """Actions that move the nodes towards `desired`; empty once they agree.

    Reads the two and nothing else, so a late, repeated or missed wake-up is harmless: the next pass
    sees what is true then. Draining nodes count for nobody, as they take no new tails; neither do those
    that an operator wants to go, so that others are started in their place.
    """
    present = [node for node in nodes if node.phase in _STAYING and _counts(node)]
    staying = [node for node in present if not node.drained]
    # A lost node is likely to be back with its KV, and one without a lane may get one: nothing is started
    # in its place, but neither does it let a ready node go. Once it is STUCK it no longer counts.
    lost = sum(node.phase is Phase.LOST and not node.drained for node in nodes)
    cut_off = [node for node in nodes if node.phase is Phase.UNREACHABLE and node.managed]
    awaited = [node for node in cut_off if not node.drained]
    # One at a time: should the fault be the weight nodes', the next one will not be reached either.
    replaced = min(len([node for node in awaited if node.replaceable]), 1)
    wanted = _more(desired - len(staying) - lost - len(awaited) + replaced, nodes)
    wanted += [_leave(node) for node in present if node.drained]
    wanted += [_leave(node) for node in _victims(len(staying) - desired, staying)]
    surplus = len(staying) + len(awaited) - desired
    wanted += _cut_off_stops(cut_off, surplus, nodes, wanted)
    wanted += _stops(nodes, wanted)
    return [*wanted, *_reminders(nodes, wanted)]


def _counts(node: NodeView) -> bool:
    """One that others run, once it serves: until then nothing of ours goes for it, nor is it drained."""
    return node.managed or node.phase is Phase.READY or node.drained


def _more(missing: int, nodes: Iterable[NodeView]) -> list[Action]:
    if missing <= 0:
        return []
    # Taking a drain back is instant and keeps KV where it is; the fullest node is the one worth keeping.
    draining = sorted(
        (node for node in nodes if node.phase is Phase.DRAINING and not node.drained and node.reached),
        key=lambda node: (-node.held_tokens, node.id),
    )[:missing]
    taken_back: list[Action] = [Undrain(node.id) for node in draining]
    missing -= len(taken_back)
    return [*taken_back, Start(missing)] if missing else taken_back


def _victims(surplus: int, staying: Iterable[NodeView]) -> list[NodeView]:
    newest_first = sorted(staying, key=lambda node: (len(node.id), node.id), reverse=True)
    # One that others run is last: as we cannot stop it, it would stay, drained.
    order = sorted(
        newest_first, key=lambda node: (not node.managed, _STAYING.index(node.phase), node.held_tokens)
    )
    return order[: max(surplus, 0)]


def _cut_off_stops(
    cut_off: Sequence[NodeView], surplus: int, nodes: Iterable[NodeView], wanted: Sequence[Action]
) -> list[Action]:
    """Nodes that no weight node reaches, where they are too many or an operator wants them gone.

    What they hold nobody can use. But while no other node serves, the fault may lie elsewhere.
    """
    if not _heir(nodes, _named(wanted)):
        return []
    newest_first = sorted(cut_off, key=lambda node: (len(node.id), node.id), reverse=True)
    awaited = [node for node in newest_first if not node.drained]
    awaited.sort(key=lambda node: not node.replaceable)
    gone = [node for node in newest_first if node.drained] + awaited[: max(surplus, 0)]
    return [Stop(node.id) for node in gone]


def _leave(node: NodeView) -> Action:
    """A process that has not registered holds nothing and has no address to be drained at."""
    return Stop(node.id) if node.phase is Phase.STARTING else Drain(node.id, node.leave_by_s)


def _stops(nodes: Iterable[NodeView], wanted: Sequence[Action]) -> list[Action]:
    ordered = _named(wanted)
    # What a node held past its deadline is computed again, which needs somebody to hold it.
    heir = _heir(nodes, ordered)
    return [
        Stop(node.id, node.held_tokens if node.overdue and not node.safe_to_delete else 0)
        for node in nodes
        if node.managed
        and node.id not in ordered
        and (_is_empty(node) or node.phase is Phase.STUCK or (node.overdue and heir))
    ]


def _heir(nodes: Iterable[NodeView], ordered: Collection[str]) -> bool:
    """Whether a node serves that is not about to leave."""
    return any(node.phase is Phase.READY and node.id not in ordered for node in nodes)


def _reminders(nodes: Iterable[NodeView], wanted: Sequence[Action]) -> list[Action]:
    """Nodes that leave already and whose deadline is another than they know."""
    ordered = _named(wanted)
    return [
        Drain(node.id, node.leave_by_s)
        for node in nodes
        if node.phase is Phase.DRAINING and not node.told and node.id not in ordered
    ]


def _named(actions: Iterable[Action]) -> set[str]:
    return {action.node for action in actions if not isinstance(action, Start)}


def _is_empty(node: NodeView) -> bool:
    return node.phase is Phase.DRAINING and node.safe_to_delete
