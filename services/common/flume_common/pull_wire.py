"""The messages of a pull: one attention node (the puller) reads closed ranges from another (the lender).

A pull has a lane of its own, which ends with it. The puller asks when it has room for the answer, chunk by
chunk, so nothing is ever sent that has no place to go; the lender looks every chunk's range up anew:

    puller -> lender  PULL    READ of some layers of some tokens of a range, or the end of the pull
    lender -> puller  PULLED  keys and values [layers, 2, tokens, kv_heads, head_dim], or a refusal

A READ names the range's generation, a number that no two ranges of a node ever share; the first READ of a
range asks for whichever there is (0) and learns it from the answer. A range that was freed, or freed and
stored again, has another one and is refused: a pull ends with the bytes it began with or with none.
COMPLETE is sent once, after the last byte is in its place; ABORT when there is no use in going on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

from flume_common.layout import KvLayout
from flume_common.wire import Kind, Words

PULL_WORDS = 8
CHUNK_BYTES = 256 << 10  # 0.1 ms of copying: as long as a query may have to wait behind one


class PullOp(IntEnum):
    """What a PULL asks for."""

    READ = 1
    COMPLETE = 2
    ABORT = 3


class PulledHeader(IntEnum):
    """Words of a PULLED frame's header beside STEP (the READ's number), BODY_BYTES and EPOCH."""

    GENERATION = 5
    REFUSED = 6  # 1: the range is not there as the READ names it; there is no body


@dataclass(frozen=True, slots=True)
class PullShape:
    """Sizes that both ends derive the same buffers from."""

    kinds: ClassVar[tuple[Kind, ...]] = (Kind.PULL, Kind.PULLED)

    layout: KvLayout
    chunk_bytes: int = CHUNK_BYTES  # of a PULLED body, at least one token of one layer

    def body_bytes(self, kind: Kind) -> int:
        """The largest body of a message of this kind."""
        match kind:
            case Kind.PULL:
                return 8 * PULL_WORDS
            case Kind.PULLED:
                return max(self.chunk_bytes, self.layout.layer_token_bytes)
            case _:
                raise ValueError(f"{kind.name} is no message of a pull")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Layers [first_layer, end_layer) of a range's tokens [begin, end), counted from its start."""

    first_layer: int
    end_layer: int
    begin: int
    end: int

    @property
    def layers(self) -> int:
        return self.end_layer - self.first_layer

    @property
    def tokens(self) -> int:
        return self.end - self.begin

    def body_bytes(self, layout: KvLayout) -> int:
        return self.layers * self.tokens * layout.layer_token_bytes


@dataclass(frozen=True, slots=True)
class Pull:
    """A PULL message. `key` is the sequence's, `start` and `tokens` the range's."""

    op: PullOp
    key: int = 0
    start: int = 0
    tokens: int = 0
    generation: int = 0
    chunk: Chunk = Chunk(0, 0, 0, 0)

    def encode(self, body: Words) -> int:
        """Write into a frame's body (int64 view); returns its bytes."""
        chunk = self.chunk
        layers = chunk.first_layer << 32 | chunk.end_layer
        body[:PULL_WORDS] = (
            self.op, self.key, self.start, self.tokens, self.generation, layers, chunk.begin, chunk.end,
        )  # fmt: skip
        return 8 * PULL_WORDS

    @classmethod
    def decode(cls, body: Words) -> Pull:
        """Raises ValueError for an op that is none."""
        op, key, start, tokens, generation, layers, begin, end = (int(word) for word in body[:PULL_WORDS])
        chunk = Chunk(layers >> 32, layers & 0xFFFFFFFF, begin, end)
        return cls(PullOp(op), key, start, tokens, generation, chunk)


def chunks(tokens: int, layout: KvLayout, chunk_bytes: int) -> Iterator[Chunk]:
    """All layers of a range, layer by layer, in the order they are read.

    Several layers travel in one chunk where a range is short, a part of one where it is long; its tokens
    follow each other, so that what lies in contiguous blocks is copied in one run.
    """
    room = max(1, chunk_bytes // layout.layer_token_bytes)
    step_layers = max(1, min(layout.num_layers, room // max(tokens, 1)))
    step_tokens = min(tokens, room)
    for first in range(0, layout.num_layers, step_layers):
        end = min(first + step_layers, layout.num_layers)
        for begin in range(0, tokens, max(step_tokens, 1)):
            yield Chunk(first, end, begin, min(begin + step_tokens, tokens))
