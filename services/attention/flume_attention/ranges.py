"""Ranges and slots: which blocks hold the tokens of a sequence, and where in memory they lie.

A *range* grows while it is open and never changes once closed. It is reference-counted, so that later
several slots may share a closed one. A *slot* is one sequence on one lane: its ranges in order. Nothing
here knows tensors: a `Run` counts in tokens of the node's KV memory.
"""

from __future__ import annotations

import itertools
from bisect import insort
from dataclasses import dataclass, field
from typing import NamedTuple

from flume_attention.blocks import Block, BlockPool

_generations = itertools.count(1)


class Run(NamedTuple):
    """Tokens that lie next to each other in KV memory."""

    first: int
    tokens: int


class Range:
    """Tokens from sequence position `start`, `length` of them committed. Made with one reference.

    No two ranges of a process have the same `generation`.
    """

    def __init__(self, blocks: BlockPool, block_tokens: int, start: int) -> None:
        self.generation = next(_generations)
        self.start = start
        self.length = 0
        self.closed = False
        self._pool = blocks
        self._block_tokens = block_tokens
        self._blocks: list[Block] = []
        self._spans: list[list[int]] = []  # [first block, number of blocks], as _blocks lie in memory
        self._references = 1

    @property
    def end(self) -> int:
        """The sequence position after the last committed token."""
        return self.start + self.length

    @property
    def num_blocks(self) -> int:
        """Blocks the committed tokens fill."""
        return self._blocks_of(self.length)

    @property
    def reserved_blocks(self) -> int:
        """Blocks taken by `reserve` and neither committed nor dropped."""
        return len(self._blocks) - self.num_blocks

    def new_blocks(self, tokens: int) -> int:
        """How many blocks `reserve(tokens)` would take."""
        return self._blocks_of(self.length + tokens) - len(self._blocks)

    def reserve(self, tokens: int) -> list[Run]:
        """Take blocks for `tokens` more and say where they go. Lengths move only with `commit`."""
        assert not self.closed
        count = self.new_blocks(tokens)
        if count > 0:
            self._extend(self._pool.allocate(count, after=self._blocks[-1] if self._blocks else None))
        return self._runs(self.length, self.length + tokens)

    def commit(self, tokens: int) -> None:
        """The reserved tokens are in."""
        self.length += tokens

    def drop_reserved(self) -> None:
        """Give back what was reserved and not committed."""
        kept, dropped = self._blocks[: self.num_blocks], self._blocks[self.num_blocks :]
        self._pool.release(dropped)
        self._blocks, self._spans = [], []
        self._extend(kept)

    def runs(self, begin: int = 0, end: int | None = None) -> list[Run]:
        """Where tokens [begin, end) of this range lie, in order; by default the committed ones."""
        return self._runs(begin, self.length if end is None else end)

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens at most and close. Not for a range that is shared."""
        assert self._references == 1
        self.length = min(self.length, max(0, length))
        self.closed = True
        self.drop_reserved()

    def retain(self) -> None:
        """One more slot holds this range. Only a closed range may be shared."""
        assert self.closed
        self._references += 1

    def release(self) -> None:
        """One slot less holds it; the last one frees its blocks."""
        assert self._references > 0
        self._references -= 1
        if self._references == 0:
            self._pool.release(self._blocks)
            self._blocks, self._spans = [], []

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def _extend(self, blocks: list[Block]) -> None:
        self._blocks += blocks
        for number, _ in blocks:
            if self._spans and sum(self._spans[-1]) == number:
                self._spans[-1][1] += 1
            else:
                self._spans.append([number, 1])

    def _runs(self, begin: int, end: int) -> list[Run]:
        """Tokens [begin, end) of this range as runs of memory."""
        runs = []
        at = 0
        for first, count in self._spans:
            tokens = count * self._block_tokens
            low, high = max(begin, at), min(end, at + tokens)
            if low < high:
                runs.append(Run(first * self._block_tokens + low - at, high - low))
            at += tokens
        return runs


@dataclass(slots=True)
class Slot:
    """One sequence on one lane. `held` is the number of its committed tokens."""

    key: int  # wire.sequence_key of the sequence
    ranges: list[Range] = field(default_factory=list)  # in order of start
    held: int = 0

    @property
    def num_blocks(self) -> int:
        return sum(item.num_blocks for item in self.ranges)

    def add(self, item: Range) -> None:
        insort(self.ranges, item, key=lambda range_: range_.start)

    def range_at(self, start: int) -> Range | None:
        """The range that starts there."""
        return next((item for item in self.ranges if item.start == start), None)

    def open_at(self, position: int) -> Range | None:
        """The open range whose next token is the one at `position`."""
        return next((item for item in self.ranges if not item.closed and item.end == position), None)

    def cut(self, position: int) -> None:
        """Keep tokens before `position` only, and close every range."""
        for item in self.ranges:
            item.cut(position - item.start)
        self.ranges = [item for item in self.ranges if item.length]
        self.held = sum(item.length for item in self.ranges)

    def release(self) -> None:
        """Let go of every range."""
        for item in self.ranges:
            item.release()

    def runs(self, position: int) -> list[Run]:
        """Where the tokens of ranges that start before `position` lie.

        Ranges that happen to meet in memory make one run.
        """
        joined: list[Run] = []
        for item in self.ranges:
            for run in item.runs() if item.start < position else ():
                if joined and joined[-1].first + joined[-1].tokens == run.first:
                    joined[-1] = Run(joined[-1].first, joined[-1].tokens + run.tokens)
                else:
                    joined.append(run)
        return joined
