"""The memory of a direct lane: where the GPUs of its two ends meet, with no host thread in between.

An attention node with a GPU makes one region per lane in its device memory, and hands out a handle with
which a process of the same host can map it. In a *direct* step (a word of its PLAN) no QUERY and PARTIAL
messages travel: the weight node's device writes queries into the region and raises `ASKED`; the attention
node's device waits for it, attends, writes o and lse into the region and raises `ANSWERED`; the weight node's
device waits for that. PLAN, KV and CREDIT are messages as ever.

A flag is an int64 that only grows: `mark(step, layer)` of the last layer asked about or answered. Steps count
up and a PLAN names its own, so nothing has to be agreed on or reset, and what is left of an abandoned step
never passes for a later one. Nobody writes poison here: each end releases its own waits by a word in its own
host memory.

Where rows lie (of R rows, each one query of H heads of D elements):

    0       ASKED, ANSWERED        int64, FLAG_STRIDE_BYTES apart
    4096    queries                [R, H, D] in the layout's dtype
            o                      like the queries
            lse                    float32 [R, H], natural log
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from flume_common.layout import KvLayout

HOPS = ("auto", "frames")  # what a node may be told
HOP_HELP = (
    "how decode steps reach attention nodes: auto is by device memory where both ends, on one host and with"
    " --device cuda, can map it, and by messages elsewhere; frames is always by messages"
)
FLAG_STRIDE_BYTES = 128
ASKED_AT = 0
ANSWERED_AT = FLAG_STRIDE_BYTES
LAYER_BITS = 12
_HEAD_BYTES = 4096
_ALIGNMENT = 256


def mark(step: int, layer: int) -> int:
    """What a flag shows once this layer of this step is asked about, or answered. Above all earlier ones."""
    return (step << LAYER_BITS) + layer + 1


@dataclass(frozen=True, slots=True)
class DirectRegion:
    """Byte offsets of everything in a region for at most `rows` rows of a step."""

    layout: KvLayout
    rows: int

    @property
    def row_bytes(self) -> int:
        """Of one row's queries, and of its o."""
        return self.layout.num_query_heads * self.layout.head_dim * self.layout.itemsize

    @property
    def lse_row_bytes(self) -> int:
        return 4 * self.layout.num_query_heads

    @property
    def queries_at(self) -> int:
        return _HEAD_BYTES

    @property
    def o_at(self) -> int:
        return _aligned(self.queries_at + self.rows * self.row_bytes)

    @property
    def lse_at(self) -> int:
        return _aligned(self.o_at + self.rows * self.row_bytes)

    @property
    def size_bytes(self) -> int:
        return _aligned(self.lse_at + self.rows * self.lse_row_bytes)


class RegionHandle(msgspec.Struct, frozen=True):
    """How another process finds a region: bytes in AttachReply, opaque to all but the two engines."""

    host: str  # `lanes.processes` knows who is on the same one
    gpu: str  # UUID of the card that the memory is on
    rows: int
    handle: bytes  # what `flume_kernels.gpu.shared_memory` made

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, encoded: bytes) -> RegionHandle:
        """Raises msgspec.MsgspecError."""
        return msgspec.msgpack.decode(encoded, type=cls)


def _aligned(at: int) -> int:
    return -(-at // _ALIGNMENT) * _ALIGNMENT
