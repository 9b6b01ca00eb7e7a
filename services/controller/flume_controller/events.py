"""What happened, for people: the values, and which happenings become one. No I/O, no clock.

As in Kubernetes: alike happenings (same object, type, reason and source) within `SIMILAR_S` are one event
that counts, and what is told too often about one object is dropped for a while.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, TypeVar

import msgspec

K = TypeVar("K")
V = TypeVar("V")

SIMILAR_S = 600.0
"""A happening this long after the last one of its kind begins a new event."""
BURST = 25
REFILL_S = 300.0
"""Per source and object: `BURST` happenings at once, then one per `REFILL_S`."""
REMEMBERED = 1024
"""Events and objects kept in memory, the longest unused dropped first."""


class EventType(StrEnum):
    NORMAL = "Normal"
    WARNING = "Warning"


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One event; the JSON value of `events/<id>`."""

    id: str
    object: str
    """What it is about, `<kind>/<name>`: `fleet/attention`, `attention/attention-3`."""
    type: EventType
    reason: str
    """One CamelCase word."""
    message: str
    """Of the last happening."""
    source: str
    """Id of the controller that saw it."""
    count: Annotated[int, msgspec.Meta(ge=1)] = 1
    first_s: float
    """Unix time of the first happening."""
    last_s: float


@dataclass(frozen=True, slots=True)
class Happening:
    """Something worth telling, before it is known whether it is news."""

    object: str
    type: EventType
    reason: str
    message: str


@dataclass(slots=True)
class Bucket:
    """Tokens that refill with time."""

    tokens: float
    at_s: float

    def take(self, now_s: float) -> bool:
        self.tokens = min(float(BURST), self.tokens + max(0.0, now_s - self.at_s) / REFILL_S)
        self.at_s = now_s
        if self.tokens < 1.0:
            return False
        self.tokens -= 1.0
        return True


@dataclass(slots=True)
class Correlator:
    """Turns happenings into events: new, counted, or dropped."""

    source: str
    dropped: int = 0
    _events: OrderedDict[tuple[str, ...], Event] = field(default_factory=OrderedDict)
    _buckets: OrderedDict[str, Bucket] = field(default_factory=OrderedDict)

    def take(self, happening: Happening, now_s: float) -> Event | None:
        """The event to write, new or counted once more; None when too much is told about its object."""
        bucket = self._buckets.setdefault(happening.object, Bucket(float(BURST), now_s))
        _touch(self._buckets, happening.object)
        if not bucket.take(now_s):
            self.dropped += 1
            return None
        kind = (happening.object, happening.type, happening.reason)
        before = self._events.get(kind)
        event = self._again(before, happening, now_s) or new_event(self.source, happening, now_s)
        self._events[kind] = event
        _touch(self._events, kind)
        return event

    def _again(self, before: Event | None, happening: Happening, now_s: float) -> Event | None:
        if before is None or now_s - before.last_s > SIMILAR_S:
            return None
        return msgspec.structs.replace(
            before, message=happening.message, count=before.count + 1, last_s=now_s
        )


def new_event(source: str, happening: Happening, now_s: float) -> Event:
    """The first of its kind. Ids sort by time."""
    what = f"{source} {happening.object} {happening.type} {happening.reason} {now_s!r}"
    digest = hashlib.sha256(what.encode()).hexdigest()[:10]
    return Event(
        id=f"{int(now_s * 1000):013d}-{digest}",
        object=happening.object,
        type=happening.type,
        reason=happening.reason,
        message=happening.message,
        source=source,
        first_s=now_s,
        last_s=now_s,
    )


def _touch(kept: OrderedDict[K, V], key: K) -> None:
    kept.move_to_end(key)
    if len(kept) > REMEMBERED:
        kept.popitem(last=False)


def encode(event: Event) -> bytes:
    return msgspec.json.encode(event)


def decode(value: bytes) -> Event:
    """Raises msgspec.ValidationError naming the field."""
    return msgspec.json.decode(value, type=Event)


def in_order(events: list[Event]) -> list[Event]:
    """Oldest last happening first, as they are printed."""
    return sorted(events, key=lambda event: (event.last_s, event.id))
