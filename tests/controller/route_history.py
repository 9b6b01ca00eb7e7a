"""Is a recorded history of the routes one that could lawfully come about? Pure.

Record every change of the weight nodes' members and of the routes, in etcd's order, and ask `violations`.
What is lawful:

    nothing -> a route       it begins, or is taken over once the former owner's is gone
    a route -> nothing       it ends
    a route -> a route       of the same owner: every edge between ranges stays one, the tail moves on; or it
                             starts anew from token 0, when it gave way for want of memory
                             of the same node with a higher epoch: registered again, or restarted
                             of another node: adopted

and of every route: ranges cover [0, ∞) in order, the last alone is open; its owner is registered under that
epoch and its key is bound to that lease; and whoever lost it to another node never writes it again under the
same epoch while it lasts. Epochs of different nodes are not compared: each fences its own node's past.

A weight node whose engine dies between a tail's move and its first token, and that takes the sequence over
from itself, drops that tail's edge. That looks unlawful, and is rare.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

Range = tuple[int, int | None, str]  # start, end, attention node
Owner = tuple[str, int]  # weight node, epoch


@dataclass(frozen=True, slots=True)
class Seen:
    """A weight node's member was written; `epoch` is None where it is gone."""

    node: str
    epoch: int | None
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Written:
    """A route was written."""

    sequence: str
    owner: Owner
    ranges: tuple[Range, ...]
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    sequence: str


@dataclass(frozen=True, slots=True)
class Gap:
    """Something was missed: what follows is where things stand, not how they came about."""


Entry = Seen | Written | Ended | Gap


def violations(history: Iterable[tuple[int, Entry]]) -> list[str]:
    """What is wrong with it, in words; empty for a lawful one. Entries with their revisions, in order."""
    checker, found, last = _Checker(), [], 0
    for revision, entry in history:
        if revision < last:
            found.append(f"revision {revision} was recorded after {last}")
        last = max(last, revision)
        found += [f"{_name(entry)}@{revision}: {wrong}" for wrong in checker.take(entry)]
    return found


def _name(entry: Entry) -> str:
    return getattr(entry, "sequence", None) or getattr(entry, "node", "gap")


@dataclass(slots=True)
class _Checker:
    owners: dict[str, Seen] = field(default_factory=dict)  # registered now, by weight node
    routes: dict[str, Written] = field(default_factory=dict)
    newest: dict[tuple[str, str], int] = field(default_factory=dict)  # epoch by sequence and weight node
    lost: dict[str, dict[Owner, Owner]] = field(default_factory=dict)  # by sequence: from whom to whom

    def take(self, entry: Entry) -> Iterator[str]:
        match entry:
            case Seen(node, None):
                self.owners.pop(node, None)
            case Seen(node):
                self.owners[node] = entry
            case Gap():
                self.routes.clear()
            case Ended(sequence):
                self.routes.pop(sequence, None)
                self.lost.pop(sequence, None)  # its name may be used again
            case Written():
                yield from self._written(entry)

    def _written(self, after: Written) -> Iterator[str]:
        yield from _shape(after.ranges)
        yield from self._owner(after)
        before = self.routes.get(after.sequence)
        if before is not None and before.owner == after.owner:
            yield from _successor(before.ranges, after.ranges)
        if before is not None and before.owner[0] != after.owner[0]:
            self.lost.setdefault(after.sequence, {})[before.owner] = after.owner
        self.routes[after.sequence] = after

    def _owner(self, after: Written) -> Iterator[str]:
        (node, epoch), key = after.owner, (after.sequence, after.owner[0])
        member = self.owners.get(node)
        if member is None or member.epoch != epoch:
            now = "not registered" if member is None else f"registered under {member.epoch}"
            yield f"{node} writes under epoch {epoch} and is {now}"
        elif member.lease != after.lease:
            yield f"bound to lease {after.lease:x}, the owner's is {member.lease:x}"
        if epoch < self.newest.get(key, 0):
            yield f"the epoch of {node} fell from {self.newest[key]} to {epoch}"
        if (by := self.lost.get(after.sequence, {}).get(after.owner)) is not None:
            yield f"{node} lost it to {by[0]} and writes again under epoch {epoch}"
        self.newest[key] = max(epoch, self.newest.get(key, 0))


def _shape(ranges: Sequence[Range]) -> Iterator[str]:
    """Disjoint, contiguous, covering, exactly one tail."""
    if not ranges:
        yield "no range"
    expected = 0
    for index, (start, end, _) in enumerate(ranges):
        if start != expected:
            yield f"a range starts at {start}, the one before ends at {expected}"
        if (end is None) != (index == len(ranges) - 1):
            yield "exactly the last range is open"
        if end is not None and end <= start:
            yield f"an empty range at {start}"
        expected = start if end is None else end


def _successor(before: Sequence[Range], after: Sequence[Range]) -> Iterator[str]:
    """Only the newest value of several changes may be written, so that any number may lie between the two."""
    if before == after or _is_new(after):
        return
    if missing := {start for start, _, _ in before} - {start for start, _, _ in after}:
        yield f"the edges at {sorted(missing)} are gone"


def _is_new(ranges: Sequence[Range]) -> bool:
    return len(ranges) == 1 and ranges[0][:2] == (0, None)
