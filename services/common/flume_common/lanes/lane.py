"""One lane: an endpoint to one peer and the channels that run over it.

It has no thread and no lock; the engine that owns the port drives it. When it goes down it says why,
once, and stays down: reconnecting is a new lane with new numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Generic

from flume_common.lanes import ucx
from flume_common.lanes.channel import Receiver, Sender
from flume_common.lanes.errors import LaneDown
from flume_common.lanes.frames import Allocate, Frame, Rings, S, block_bytes, cut
from flume_common.lanes.tags import Side, tag_of
from flume_common.wire import Kind


class Lane(Generic[S]):
    """Two joined nodes, seen from one end. Made by `Port.connect`.

    `shape` and `peer` are what it was made with. An owner that waits or progresses notices a killed
    peer within `NOTICE_S`; measured 3 to 25 ms over TCP and in the same pid namespace, up to 400 ms
    over shared memory between two namespaces. A peer that is merely stopped is not noticed, nor a host
    that fell silent: deadlines are the owner's business.
    """

    NOTICE_S = 2.0

    def __init__(
        self,
        retire: Callable[[Lane[Any], Any, list[Frame]], None],
        endpoint: Any,
        process_fd: int | None,
        peer: str,
        shape: S,
        side: Side,
        send_lane: int,
        receive_lane: int,
        allocate: Allocate,
        rings: Rings,
    ) -> None:
        self.peer = peer
        self.shape = shape
        self.process_fd = process_fd
        self._retire = retire
        self._endpoint = endpoint
        self._error: str | None = None
        frames = cut(allocate(block_bytes(shape, rings)), shape, rings)
        self._senders = {
            kind: Sender(self, endpoint, kind, tag_of(send_lane, kind), frames[kind]) for kind in side.sends
        }
        self._receivers = {
            kind: Receiver(self, endpoint, kind, tag_of(receive_lane, kind), frames[kind])
            for kind in side.receives
        }

    @property
    def alive(self) -> bool:
        """False for good once the peer is known to be gone or the lane was closed."""
        if self._error is None and not self._endpoint.alive:
            self.fail(ucx.reason_of(self._endpoint))
        return self._error is None

    @property
    def error(self) -> str | None:
        """Why the lane is down; None while it is up."""
        return None if self.alive else self._error

    def sender(self, kind: Kind) -> Sender:
        """Raises KeyError for a kind this side does not send."""
        return self._senders[kind]

    def receiver(self, kind: Kind) -> Receiver:
        """Raises KeyError for a kind this side does not receive."""
        return self._receivers[kind]

    def require_up(self) -> None:
        """Raises LaneDown."""
        if not self.alive:
            assert self._error is not None
            raise LaneDown(self.peer, self._error)

    def fail(self, reason: str) -> None:
        """Take the lane down; the first reason is the one that stays."""
        if self._error is None:
            self._error = reason

    def close(self) -> None:
        """Cancel what is in flight and let the endpoint go. Idempotent.

        Frames the user still holds stay valid memory. Over TCP the peer of a lane with a berth of its own
        sees its lane go down at once; over shared memory, and at a shared berth, it has to be told.
        """
        self.fail("closed by this end")
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is None:
            return
        sending = [frame for sender in self._senders.values() for frame in sender.detach()]
        receiving = [frame for receiver in self._receivers.values() for frame in receiver.detach()]
        self._retire(self, endpoint, sending + receiving)
        if self.process_fd is not None:
            os.close(self.process_fd)
            self.process_fd = None
