"""Taking over a sequence whose weight node died: which of what the attention nodes kept is used. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flume_common.routes import TokenRange

from flume_weight.storage import Hole, Part


def choose(kept: Mapping[str, Sequence[Part]], position: int) -> dict[str, list[Part]]:
    """By node, the parts to take over, closed and cut at `position`.

    A node gives all it has of a sequence or nothing. Two may hold the same tokens, where a range was
    lost from sight and computed again: then the one that holds more is taken.
    """
    cut = {node: _cut(parts, position) for node, parts in kept.items()}
    chosen: dict[str, list[Part]] = {}
    for node in sorted(cut, key=lambda node: (-sum(part.tokens for part in cut[node]), node)):
        taken = [part for parts in chosen.values() for part in parts]
        overlaps = any(a.start < b.end and b.start < a.end for a in cut[node] for b in taken)
        if cut[node] and not overlaps:
            chosen[node] = cut[node]
    return chosen


def _cut(parts: Sequence[Part], position: int) -> list[Part]:
    return [
        Part(part.start, min(part.tokens, position - part.start), is_open=False)
        for part in parts
        if part.start < position and part.tokens
    ]


def lay_out(
    chosen: Mapping[str, Sequence[Part]], tail_node: str
) -> tuple[tuple[TokenRange, ...], list[Hole]]:
    """Ranges of a route over these parts, its tail behind the last of them, and the holes between them.

    A hole's range names `tail_node`, as a route must name some node, until the hole is filled.
    """
    ranges: list[TokenRange] = []
    holes: list[Hole] = []
    end = 0
    for part, node in sorted(((p, n) for n, parts in chosen.items() for p in parts), key=_start):
        if part.start > end:
            holes.append(Hole(end, part.start, end))
            ranges.append(TokenRange(end, part.start, tail_node))
        ranges.append(TokenRange(part.start, part.end, node))
        end = part.end
    return (*ranges, TokenRange(end, None, tail_node)), holes


def _start(item: tuple[Part, str]) -> int:
    return item[0].start
