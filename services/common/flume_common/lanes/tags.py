"""The 64-bit UCX tag of a message: lane number above, kind in the low eight bits.

Receives match the whole tag, so a posted buffer waits for exactly one channel and never goes stale.
"""

from __future__ import annotations

from enum import Enum
from typing import NewType

from flume_common.wire import Kind

Tag = NewType("Tag", int)

KIND_BITS = 8
MAX_LANE = (1 << (64 - KIND_BITS)) - 1
LANE_MASK = MAX_LANE << KIND_BITS


class Side(Enum):
    """Which end of a lane a process is, and so which kinds it sends."""

    WEIGHT = "weight"
    ATTENTION = "attention"
    PULLER = "puller"
    LENDER = "lender"

    @property
    def sends(self) -> tuple[Kind, ...]:
        return _SENT[self]

    @property
    def receives(self) -> tuple[Kind, ...]:
        return _SENT[_OTHER[self]]


_SENT = {
    Side.WEIGHT: (Kind.PLAN, Kind.QUERY, Kind.KV),
    Side.ATTENTION: (Kind.PARTIAL, Kind.CREDIT),
    Side.PULLER: (Kind.PULL,),
    Side.LENDER: (Kind.PULLED,),
}
_OTHER = {
    Side.WEIGHT: Side.ATTENTION,
    Side.ATTENTION: Side.WEIGHT,
    Side.PULLER: Side.LENDER,
    Side.LENDER: Side.PULLER,
}


def tag_of(lane: int, kind: Kind) -> Tag:
    """Raises ValueError when the lane number does not fit above the kind."""
    if not 0 <= lane <= MAX_LANE:
        raise ValueError(f"lane {lane} is not in 0..{MAX_LANE}")
    return Tag(lane << KIND_BITS | kind)
