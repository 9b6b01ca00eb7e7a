"""Which weight node gets the next sequence. A pure function over what is known of each."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec


class Candidate(msgspec.Struct, frozen=True):
    node: str
    outstanding: int
    """Sequences this router has running there."""
    picked_at_s: float = 0.0
    """When it was last chosen; the longest ago goes first among equals."""
    listed: bool = True
    """Whether it is a READY member now. One that just vanished is better than none."""
    suspect: bool = False
    """Whether a call to it failed a moment ago."""


def pick(candidates: Iterable[Candidate], exclude: Collection[str] = ()) -> str | None:
    """The node with the fewest outstanding sequences; doubtful ones only when there is no other."""
    allowed = [candidate for candidate in candidates if candidate.node not in exclude]
    if not allowed:
        return None
    return min(allowed, key=lambda c: (not c.listed, c.suspect, c.outstanding, c.picked_at_s)).node
