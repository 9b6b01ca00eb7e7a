"""Frames: the fixed buffers a channel's messages are written to and read from.

All frames of a lane are cut from one block that is allocated and touched when the lane is made. A frame
starts on a page; its header comes first and its body right behind it, so one message carries both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from flume_common.lanes.ucx import Array
from flume_common.wire import HEADER_BYTES, Kind

Allocate = Callable[[int], NDArray[np.uint8]]
Bytes = NDArray[np.uint8]

PAGE_BYTES = 4096
# A sent size costs one UCXX array (0.9 µs, against 0.03 µs to look it up). Decode repeats few sizes.
_MAX_CACHED_SIZES = 64

# Frames in flight per channel. The sender of QUERY and PARTIAL runs at most a layer or two ahead, KV
# frames are few but large, and CREDIT must never hold its sender up.
RING_FRAMES = dict.fromkeys(Kind, 4) | {Kind.CREDIT: 8}

Rings = Mapping[Kind, int]
"""Frames of those channels that one end wants another number of; its peer need not know."""
USUAL: Rings = {}


class Shape(Protocol):
    """Which kinds a lane carries, both directions, and how large their bodies may be."""

    @property
    def kinds(self) -> tuple[Kind, ...]: ...

    def body_bytes(self, kind: Kind) -> int: ...


S = TypeVar("S", bound=Shape)


class Frame:
    """One buffer: `header` int64 [HEADER_WORDS], `body` uint8 [capacity], `words` the body as int64.

    The capacity is the shape's largest body of this kind, rounded up to whole words.
    """

    __slots__ = ("_arrays", "_buffer", "body", "header", "request", "words")

    def __init__(self, buffer: Bytes) -> None:
        self._buffer = buffer
        self._arrays: dict[int, Any] = {}
        self.header: NDArray[np.int64] = buffer[:HEADER_BYTES].view(np.int64)
        self.body: Bytes = buffer[HEADER_BYTES:]
        self.words: NDArray[np.int64] = self.body.view(np.int64)
        self.request: Any = None  # of the transfer that uses the buffer now; None while the user has it

    def array(self, body_bytes: int) -> Any:
        """The UCXX array over the header and the first `body_bytes` of the body."""
        array = self._arrays.get(body_bytes)
        if array is None:
            if len(self._arrays) >= _MAX_CACHED_SIZES:
                self._arrays.clear()
            array = self._arrays[body_bytes] = Array(self._buffer[: HEADER_BYTES + body_bytes])
        return array

    def whole(self) -> Any:
        return self.array(len(self.body))


def capacity_bytes(shape: Shape, kind: Kind) -> int:
    """Bytes of a frame's body: the kind's largest body in whole int64 words."""
    return -(-shape.body_bytes(kind) // 8) * 8


def block_bytes(shape: Shape, rings: Rings = USUAL) -> int:
    """Bytes of all frames of one end of a lane, each on its own pages."""
    return sum(_ring(kind, rings) * _stride(shape, kind) for kind in shape.kinds)


def cut(block: Bytes, shape: Shape, rings: Rings = USUAL) -> dict[Kind, list[Frame]]:
    """Every channel's frames. Raises ValueError unless the block is uint8 [block_bytes] on a page."""
    size = block_bytes(shape, rings)
    if block.dtype != np.uint8 or block.ndim != 1 or block.size < size or not block.flags.c_contiguous:
        raise ValueError(f"a lane's block is contiguous uint8 [{size}], not {block.dtype} {block.shape}")
    if block.ctypes.data % PAGE_BYTES:
        raise ValueError("a lane's block starts on a page boundary")
    frames: dict[Kind, list[Frame]] = {}
    at = 0
    for kind in shape.kinds:
        length, stride = HEADER_BYTES + capacity_bytes(shape, kind), _stride(shape, kind)
        starts = range(at, at + _ring(kind, rings) * stride, stride)
        frames[kind] = [Frame(block[start : start + length]) for start in starts]
        at = starts.stop
    return frames


def allocate_pages(size_bytes: int) -> Bytes:
    """Zeroed ordinary memory on a page boundary, every page touched: no fault happens during a step."""
    raw = np.empty(size_bytes + PAGE_BYTES, dtype=np.uint8)
    start = -raw.ctypes.data % PAGE_BYTES
    block: Bytes = raw[start : start + size_bytes]
    block.fill(0)
    return block


def _ring(kind: Kind, rings: Rings) -> int:
    """Raises ValueError for a channel without a frame."""
    frames = rings.get(kind, RING_FRAMES[kind])
    if frames < 1:
        raise ValueError(f"a {kind.name} ring has at least 1 frame, not {frames}")
    return frames


def _stride(shape: Shape, kind: Kind) -> int:
    return -(-(HEADER_BYTES + capacity_bytes(shape, kind)) // PAGE_BYTES) * PAGE_BYTES
