"""Which closed ranges leave a node that must be empty soon, and to where. Pure: values in, values out.

The KV moves from node to node; the weight node only says which and swaps the route afterwards. One batch
is under way at a time: more would not be faster, as the nodes read at a bounded pace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flume_common.layout import KvLayout

MAX_RANGES = 16  # of one batch
RETRY_S = 0.5  # after a batch of which nothing arrived


@dataclass(frozen=True, slots=True)
class ClosedRange:
    """A closed range on a node that is to be emptied."""

    sequence: str
    start: int
    tokens: int
    node: str
    tail_node: str  # of its sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """Ranges that go from one node to one other."""

    source: str
    target: str
    ranges: tuple[ClosedRange, ...]


def choose(ranges: Iterable[ClosedRange], room_blocks: Mapping[str, int], layout: KvLayout) -> Batch | None:
    """The next batch; None when there is nothing to move or no node has room for any of it.

    `room_blocks` is what the nodes that may take ranges have free. A range goes where its sequence's tail
    is, which costs its steps no further partial, and otherwise to the node with the most room.
    """
    source = target = ""
    left = dict(room_blocks)
    chosen: list[ClosedRange] = []
    for item in ranges:
        blocks = layout.blocks_of(item.tokens)
        wanted = _target(item, left, blocks)
        if wanted is None or (chosen and (item.node, wanted) != (source, target)):
            continue
        source, target = item.node, wanted
        left[target] -= blocks
        chosen.append(item)
        if len(chosen) == MAX_RANGES:
            break
    return Batch(source, target, tuple(chosen)) if chosen else None


def _target(item: ClosedRange, room_blocks: Mapping[str, int], blocks: int) -> str | None:
    fit = [node for node, room in room_blocks.items() if room >= blocks and node != item.node]
    if item.tail_node in fit:
        return item.tail_node
    return min(fit, key=lambda node: (-room_blocks[node], node), default=None)
