"""Which blocks hold the past of a row: runs of tokens as block tables. Pure.

A table names blocks whose tokens follow one another, so only its last block may be part filled. A sequence
whose tail came by more than once has ranges that end within a block: then its past is several tables, a
*segment* each, whose partials are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flume_attention.ranges import Run


@dataclass(frozen=True, slots=True)
class Segment:
    """`tokens` tokens, in these blocks in this order."""

    blocks: list[int]
    tokens: int


def segments(runs: Sequence[Run], block_tokens: int) -> list[Segment]:
    """The runs of a row as few segments as they allow; a run starts on a block."""
    found: list[Segment] = []
    for run in runs:
        assert run.first % block_tokens == 0, run
        first = run.first // block_tokens
        blocks = range(first, first + -(-run.tokens // block_tokens))
        if found and found[-1].tokens % block_tokens == 0:
            last = found.pop()
            found.append(Segment([*last.blocks, *blocks], last.tokens + run.tokens))
        else:
            found.append(Segment(list(blocks), run.tokens))
    return found


def cut(segment: Segment, most_blocks: int, block_tokens: int) -> list[Segment]:
    """The segment as pieces of at most so many blocks."""
    size = most_blocks * block_tokens
    return [
        Segment(segment.blocks[at : at + most_blocks], min(size, segment.tokens - at * block_tokens))
        for at in range(0, len(segment.blocks), most_blocks)
    ]


def slots(runs: Sequence[Run]) -> list[int]:
    """Where in memory each token of these runs lies, counted in tokens from the first block."""
    return [slot for run in runs for slot in range(run.first, run.first + run.tokens)]
