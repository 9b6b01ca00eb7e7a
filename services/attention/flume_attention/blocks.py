"""The blocks of a node's KV memory: which are free, which are held and by how many ranges.

Pure bookkeeping, no memory of its own. Blocks of one range are placed next to each other where possible,
because attention over a contiguous run reads keys and values where they lie.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Block(NamedTuple):
    """One use of a block. Its generation tells it from earlier and later uses of the same memory."""

    number: int
    generation: int


class OutOfBlocks(Exception):
    """More blocks are wanted than are free. Credit is there to make this impossible."""

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(f"{wanted} blocks wanted, {free} are free")
        self.wanted = wanted
        self.free = free


class StaleBlock(Exception):
    """A reference to a block that was freed since, and perhaps given to someone else."""

    def __init__(self, block: Block, generation: int) -> None:
        super().__init__(f"block {block.number} generation {block.generation}: now {generation}, or free")
        self.block = block
        self.generation = generation


class BlockPool:
    """`num_blocks` blocks, each free or held by one or more references."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = np.zeros(num_blocks, dtype=np.int32)
        self._generations = np.zeros(num_blocks, dtype=np.int64)
        self._held = 0

    @property
    def held(self) -> int:
        """Blocks with at least one reference."""
        return self._held

    @property
    def free(self) -> int:
        return self.num_blocks - self._held

    def references(self, block: Block) -> int:
        """How many hold this use of the block; 0 when it is over."""
        if self._generations[block.number] != block.generation:
            return 0
        return int(self._references[block.number])

    def allocate(self, count: int, after: Block | None = None) -> list[Block]:
        """`count` free blocks with one reference each, in the order the range should fill them.

        Continues right behind `after` as far as that is free, then in the largest gaps.
        Raises OutOfBlocks, having taken nothing.
        """
        if count > self.free:
            raise OutOfBlocks(count, self.free)
        taken: list[Block] = []
        if after is not None:
            taken += self._take_from(after.number + 1, count)
        while len(taken) < count:
            taken += self._take_from(self._new_run(), count - len(taken))
        return taken

    def retain(self, blocks: Iterable[Block]) -> None:
        """One more reference to each. Raises StaleBlock at the first that is gone."""
        for block in blocks:
            self._require_held(block)
            self._references[block.number] += 1

    def release(self, blocks: Iterable[Block]) -> None:
        """One reference less to each; the last one frees the block. Raises StaleBlock."""
        for number, generation in blocks:
            self._require_held(Block(number, generation))
            self._references[number] -= 1
            if self._references[number] == 0:
                self._generations[number] += 1
                self._held -= 1

    def _take_from(self, start: int, limit: int) -> list[Block]:
        taken = []
        for number in range(start, min(start + limit, self.num_blocks)):
            if self._references[number]:
                break
            self._references[number] = 1
            taken.append(Block(number, int(self._generations[number])))
        self._held += len(taken)
        return taken

    def _new_run(self) -> int:
        """Where a new run starts: in the middle of the largest gap, so that both neighbours can grow.

        A gap at the very start has no neighbour before it, so nothing is left there.
        """
        start, length = largest_gap(self._references == 0)
        return start if start == 0 else start + length // 2

    def _require_held(self, block: Block) -> None:
        if self.references(block) == 0:
            raise StaleBlock(block, int(self._generations[block.number]))


def largest_gap(free: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> tuple[int, int]:
    """Start and length of the longest stretch of True in free [n]; (0, 0) if there is none."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], free.astype(np.int8), [0]))))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return 0, 0
    best = int(np.argmax(ends - starts))
    return int(starts[best]), int(ends[best] - starts[best])
