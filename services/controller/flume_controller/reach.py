"""Which attention nodes can be reached. A member record is a claim, a weight node's lane is evidence. Pure.

A record that says READY counts once a weight node has a lane to that node. Where no weight node says what
lanes it has (none is alive, all are loading their model, or one is of an older version) nothing is known:
the record counts, but for one whose address nothing answers at, or another node does. What is not known is
never a reason to stop a node.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from flume_common.membership import Member, State


class Answer(StrEnum):
    """What calling a member showed."""

    YES = "YES"  # the node that the record names
    SILENT = "SILENT"  # nothing in time: it may be slow
    REFUSED = "REFUSED"  # nothing listens there
    OTHER = "OTHER"  # a node of another name


class Reach(StrEnum):
    """How far an attention node can be counted on."""

    YES = "YES"  # a lane leads there, did so a moment ago, or nothing is known
    JOINING = "JOINING"  # no lane yet
    NO = "NO"  # no lane for longer than that takes, or nothing of its name at its address
    OVERDUE = "OVERDUE"  # no lane for so long that another node should take its place


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the weight nodes say of their lanes."""

    reached: frozenset[str] = frozenset()
    complete: bool = False  # a node that is in nobody's list has no lane

    @classmethod
    def of(cls, weights: Iterable[Member], answers: Mapping[str, Answer]) -> Evidence:
        """`answers` by id; a weight node that is missing there is taken at its word."""
        real = [
            member
            for member in weights
            if answers.get(member.id, Answer.YES) not in (Answer.REFUSED, Answer.OTHER)
        ]
        lanes = [member.lanes for member in real if member.lanes is not None]
        mute = any(member.lanes is None and member.state is State.READY for member in real)
        return cls(frozenset(node for item in lanes for node in item), bool(lanes) and not mute)

    def reaches(self, node: str) -> bool | None:
        """None: not known."""
        if node in self.reached:
            return True
        return False if self.complete else None


@dataclass(frozen=True, slots=True)
class ReachPatience:
    """How long a node may be without a lane."""

    joining_s: float = 10.0
    """Until it counts as unreachable; the same for one whose lanes were lost."""
    replace_s: float = 60.0
    """Until another one should take its place."""


@dataclass(slots=True)
class ReachMemory:
    """Which nodes were ever reached, and since when they are not. Losing it only delays actions."""

    patience: ReachPatience = field(default_factory=ReachPatience)
    _were_reached: set[str] = field(default_factory=set)
    _missing_since_s: dict[str, float] = field(default_factory=dict)

    def look(
        self, nodes: Collection[str], evidence: Evidence, answers: Mapping[str, Answer], now_s: float
    ) -> dict[str, Reach]:
        """The reach of each node that is registered, by id. `answers`: as far as nodes were called."""
        self._were_reached &= set(nodes)
        for node in self._missing_since_s.keys() - set(nodes):
            del self._missing_since_s[node]
        return {node: self._of(node, evidence, answers.get(node), now_s) for node in nodes}

    def next_change_s(self, now_s: float) -> float | None:
        """Seconds until waiting alone changes the reach of a node; None: it will not."""
        limits_s = (self.patience.joining_s, self.patience.replace_s)
        waits_s = [
            since_s + limit_s - now_s for since_s in self._missing_since_s.values() for limit_s in limits_s
        ]
        return min((wait_s for wait_s in waits_s if wait_s > 0), default=None)

    def _of(self, node: str, evidence: Evidence, answer: Answer | None, now_s: float) -> Reach:
        reached = evidence.reaches(node)
        if reached:
            self._were_reached.add(node)
            self._missing_since_s.pop(node, None)
            return Reach.YES
        if reached is None:
            self._missing_since_s.pop(node, None)
            return Reach.NO if answer in (Answer.OTHER, Answer.REFUSED) else Reach.YES
        missing_s = now_s - self._missing_since_s.setdefault(node, now_s)
        if answer is Answer.OTHER:
            return Reach.NO
        if missing_s < self.patience.joining_s:
            return Reach.YES if node in self._were_reached else Reach.JOINING
        return Reach.NO if missing_s < self.patience.replace_s else Reach.OVERDUE
