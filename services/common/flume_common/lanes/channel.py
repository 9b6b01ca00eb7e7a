"""The two ends of a channel: one kind of message in one direction of a lane.

A channel is a ring of frames. The sender fills the next free frame and sends it; the receiver has every
frame of its ring posted and gets them back filled, strictly in the order sent, whatever their sizes.
Nothing here blocks: a ring with no free frame answers None, and `Port.wait` is where waiting happens.

Memory: a frame handed out by `frame()` or `poll()` is the caller's until `send()` or `give_back()`;
from then on UCX reads or writes it until the transfer completes, and only progress completes it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from ucxx._lib.libucxx import UCXXTag

from flume_common.lanes.frames import Frame
from flume_common.lanes.tags import Tag
from flume_common.wire import Header, Kind

if TYPE_CHECKING:
    from flume_common.lanes.lane import Lane

_OK = 0


class Sender:
    """Sends messages of one kind. Owned by one thread."""

    def __init__(self, lane: Lane, endpoint: Any, kind: Kind, tag: Tag, frames: list[Frame]) -> None:
        self._lane = lane
        self._send = endpoint.tag_send
        self._kind = kind
        self._tag = UCXXTag(tag)
        self._frames = deque(frames)  # the next to fill comes first
        self._max_bytes = lane.shape.body_bytes(kind)

    def frame(self) -> Frame | None:
        """The next free frame, the same one until it is sent; None while the whole ring is in flight.

        Raises LaneDown. The header keeps what its last message said, except that nothing clears it.
        """
        self._lane.require_up()
        frame = self._frames[0]
        request = frame.request
        if request is None:
            return frame
        if not request.completed:
            return None
        if request.status != _OK:
            self._lane.fail(f"sending {self._kind.name} failed with UCX status {request.status}")
            self._lane.require_up()
        frame.request = None
        return frame

    def send(self, frame: Frame, body_bytes: int) -> None:
        """Send the header and the first `body_bytes` of the body; sets Header.BODY_BYTES.

        Raises LaneDown, and ValueError for a body larger than this kind's largest or a frame other
        than the one `frame()` gave.
        """
        if frame is not self._frames[0] or frame.request is not None:
            raise ValueError(f"not the {self._kind.name} frame that frame() gave")
        if not 0 <= body_bytes <= self._max_bytes:
            raise ValueError(f"a {self._kind.name} body has 0..{self._max_bytes} bytes, not {body_bytes}")
        self._lane.require_up()
        frame.header[Header.BODY_BYTES] = body_bytes
        frame.request = self._send(frame.array(body_bytes), self._tag)
        self._frames.rotate(-1)

    def in_flight(self) -> list[Frame]:
        return [frame for frame in self._frames if frame.request is not None]


class Receiver:
    """Receives messages of one kind. Owned by one thread."""

    def __init__(self, lane: Lane, endpoint: Any, kind: Kind, tag: Tag, frames: list[Frame]) -> None:
        self._lane = lane
        self._receive = endpoint.tag_recv
        self._kind = kind
        self._tag = UCXXTag(tag)
        self._posted: deque[Frame] = deque()
        self._out: set[Frame] = set()  # with the user
        for frame in frames:
            self._post(frame)

    def poll(self) -> Frame | None:
        """The oldest message that has arrived and was not polled yet; None if there is none.

        Messages that arrived before the lane went down are still delivered; then LaneDown is raised.
        """
        if not self._posted:
            self._lane.require_up()
            return None
        frame = self._posted[0]
        request = frame.request
        if not request.completed:
            self._lane.require_up()
            return None
        if request.status != _OK:
            self._lane.fail(f"receiving {self._kind.name} failed with UCX status {request.status}")
            self._lane.require_up()
        self._posted.popleft()
        frame.request = None
        self._out.add(frame)
        return frame

    def give_back(self, frame: Frame) -> None:
        """Post the frame's buffer again; its contents belong to UCX from here. Quiet on a lane that is down.

        Raises ValueError for a frame that `poll()` did not give, or that was given back already.
        """
        if frame not in self._out:
            raise ValueError(f"not a {self._kind.name} frame that poll() gave")
        self._out.remove(frame)
        if self._lane.alive:
            self._post(frame)

    def in_flight(self) -> list[Frame]:
        return list(self._posted)

    def _post(self, frame: Frame) -> None:
        frame.request = self._receive(frame.whole(), self._tag)
        self._posted.append(frame)
