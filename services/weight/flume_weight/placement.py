"""Where a sequence's tail goes. Pure: values in, a node's name out.

A tail's node is chosen when a sequence starts, when the node it is on is full or draining, and when
another node holds so much less that moving the tail there relieves the fuller one. Moving a tail
moves no KV: the old range is closed and the next tokens are stored elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NodeView:
    """What a weight node knows of one attention node between two steps."""

    node: str
    capacity_blocks: int
    available_blocks: int  # unused credit, plus what the node said was free, less what is promised to others
    tails: int  # open tails of this weight node's sequences
    draining: bool = False

    @property
    def used_blocks(self) -> int:
        return self.capacity_blocks - self.available_blocks


@dataclass(frozen=True, slots=True)
class TailView:
    """One open tail."""

    sequence: str
    node: str
    range_tokens: int  # tokens in the open range
    length_tokens: int  # committed tokens of the whole sequence


@dataclass(frozen=True, slots=True)
class Balance:
    """When a tail moves although its node has room.

    A move costs every later step one more partial, so a range must have become long enough, in
    itself and against its sequence, before the next one is opened: the number of ranges of a
    sequence grows with the logarithm of its length.
    """

    margin_tokens: int = 128  # how much emptier the other node must be
    share_of_sequence: int = 8  # the closed range holds at least 1/8 of the sequence


def place(nodes: Iterable[NodeView], need_blocks: int = 1) -> str | None:
    """The node for a new tail: most available blocks, then fewest tails, then name.

    None when no node that is not draining has `need_blocks`.
    """
    fit = [view for view in nodes if not view.draining and view.available_blocks >= max(need_blocks, 1)]
    if not fit:
        return None
    return min(fit, key=lambda view: (-view.available_blocks, view.tails, view.node)).node


def relieve(
    tails: Sequence[TailView], nodes: Sequence[NodeView], block_tokens: int, balance: Balance
) -> dict[str, str]:
    """Tails to move at this token boundary: sequence -> new node.

    Every tail on a draining node moves if any other node has room. Of the others, those move whose
    node holds at least `margin_tokens` more than the emptiest one and whose range is long enough.
    """
    by_name = {view.node: view for view in nodes}
    moves: dict[str, str] = {}
    for tail in tails:
        source = by_name.get(tail.node)
        target_name = place(view for view in nodes if view.node != tail.node)
        if source is None or target_name is None:
            continue
        target = by_name[target_name]
        long_enough = tail.range_tokens >= max(
            balance.margin_tokens, tail.length_tokens // balance.share_of_sequence
        )
        fuller_tokens = (source.used_blocks - target.used_blocks) * block_tokens
        if source.draining or (long_enough and fuller_tokens >= balance.margin_tokens):
            moves[tail.sequence] = target_name
    return moves


def fits_empty(capacities_blocks: Sequence[int], block_tokens: int) -> int:
    """Tokens of one sequence that all nodes together are sure to hold while nothing else is there.

    Every node but one may end in a block that its range does not fill.
    """
    return max(0, sum(capacities_blocks) - max(0, len(capacities_blocks) - 1)) * block_tokens
