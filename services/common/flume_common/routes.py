"""Routes as values: which attention node holds which tokens of a sequence.

A route covers `[0, ∞)` with disjoint, contiguous ranges in order; exactly the last one, the tail,
is open. Every change makes a new route, so whoever captured one keeps a consistent view.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flume_protos.v1 import common_pb2 as pb


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Tokens `[start, end)` on one attention node; `end` is None for the open tail."""

    start: int
    end: int | None
    node: str


@dataclass(frozen=True, slots=True)
class Route:
    """The ranges of one sequence. Raises ValueError when they break the rules above."""

    sequence: str
    weight_node: str
    epoch: int
    ranges: tuple[TokenRange, ...]

    def __post_init__(self) -> None:
        if not self.ranges:
            raise ValueError(f"route of {self.sequence} has no range")
        expected = 0
        for index, item in enumerate(self.ranges):
            last = index == len(self.ranges) - 1
            if item.start != expected:
                raise ValueError(f"route of {self.sequence}: range starts at {item.start}, not {expected}")
            if (item.end is None) != last:
                raise ValueError(f"route of {self.sequence}: exactly the last range is open")
            if item.end is not None and item.end <= item.start:
                raise ValueError(f"route of {self.sequence}: empty range at {item.start}")
            expected = item.end or 0

    @property
    def tail(self) -> TokenRange:
        return self.ranges[-1]

    @property
    def nodes(self) -> frozenset[str]:
        return frozenset(item.node for item in self.ranges)

    @classmethod
    def start(cls, sequence: str, weight_node: str, epoch: int, node: str) -> Route:
        """A route whose tail begins at token 0 on `node`."""
        return cls(sequence, weight_node, epoch, (TokenRange(0, None, node),))

    def move_tail(self, length: int, node: str) -> Route:
        """Close the tail at `length` committed tokens and continue on `node`. No KV moves.

        A tail that holds nothing yet is replaced rather than closed; a move onto the same node
        changes nothing. Raises ValueError when `length` lies before the tail.
        """
        tail = self.tail
        if length < tail.start:
            raise ValueError(
                f"route of {self.sequence}: cannot close at {length}, the tail starts at {tail.start}"
            )
        if node == tail.node:
            return self
        if length == tail.start:
            kept = self.ranges[:-1]
            return replace(self, ranges=(*kept, TokenRange(length, None, node)))
        closed = replace(tail, end=length)
        return replace(self, ranges=(*self.ranges[:-1], closed, TokenRange(length, None, node)))

    def replace_holder(self, start: int, end: int, node: str) -> Route:
        """Tokens `[start, end)` of one closed range are on `node` now; the rest of it stays where it was.

        Raises ValueError when they are not part of one closed range.
        """
        for index, item in enumerate(self.ranges):
            if item.end is not None and item.start <= start < end <= item.end:
                pieces = (
                    TokenRange(item.start, start, item.node),
                    TokenRange(start, end, node),
                    TokenRange(end, item.end, item.node),
                )
                kept = tuple(piece for piece in pieces if piece.start != piece.end)
                return replace(self, ranges=(*self.ranges[:index], *kept, *self.ranges[index + 1 :]))
        raise ValueError(f"route of {self.sequence}: [{start}, {end}) is not part of one closed range")

    def to_proto(self) -> pb.Route:
        return pb.Route(
            sequence=self.sequence,
            weight_node=self.weight_node,
            epoch=self.epoch,
            ranges=[pb.TokenRange(start=r.start, end=r.end, node=r.node) for r in self.ranges],
        )

    @classmethod
    def from_proto(cls, message: pb.Route) -> Route:
        ranges = tuple(
            TokenRange(r.start, r.end if r.HasField("end") else None, r.node) for r in message.ranges
        )
        return cls(message.sequence, message.weight_node, message.epoch, ranges)
