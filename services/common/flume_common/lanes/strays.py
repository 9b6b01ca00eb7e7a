"""Messages for lanes that were closed: taken from UCX and thrown away.

UCX keeps a message nobody has posted a receive for. A peer that has not heard yet that its lane was
closed may go on sending for a while, and without this each such message would stay for the life of
the process.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from flume_common.lanes import ucx
from flume_common.lanes.tags import LANE_MASK, tag_of
from flume_common.wire import Kind

_REMEMBERED_LANES = 64  # by then a peer has long heard


class Strays:
    """The closed lanes of one worker."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._mask = ucx.lib.UCXXTagMask(LANE_MASK)
        self._lanes: deque[Any] = deque(maxlen=_REMEMBERED_LANES)
        self._receiving: list[tuple[Any, Any]] = []  # request, its scratch buffer

    def expect(self, receive_lane: int) -> None:
        """This lane is closed: whatever still comes for it is unwanted."""
        self._lanes.append(ucx.lib.UCXXTag(tag_of(receive_lane, Kind.PLAN)))

    def collect(self) -> None:
        """Take what has come since the last time."""
        self._receiving = [entry for entry in self._receiving if not entry[0].completed]
        for lane in self._lanes:
            self._take(lane, self._mask)

    def _take(self, tag: Any, mask: Any) -> None:
        while (found := self._worker.tag_probe(tag, mask, True)).matched:
            scratch = ucx.Array(np.empty(max(found.length, 1), dtype=np.uint8))
            self._receiving.append((self._worker.tag_recv_with_handle(scratch, found), scratch))

    def close(self) -> None:
        """Take everything, of any lane, and let go of the worker, which is about to end.

        UCXX would do it too, but wait for each message to be whole: for ever, when it is a large one
        from a peer that died or stands still. The buffers stay until this object goes.
        """
        any_tag, any_mask = ucx.lib.UCXXTag(0), ucx.lib.UCXXTagMask(0)
        self._take(any_tag, any_mask)
        self._worker.progress()
        self._take(any_tag, any_mask)
        self._receiving = [(None, scratch) for _, scratch in self._receiving]
        self._worker = None
