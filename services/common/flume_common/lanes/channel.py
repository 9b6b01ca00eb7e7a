"""The two ends of a channel: one kind of message in one direction of a lane.

A channel is a ring of frames. The sender fills the next free frame and sends it; the receiver has every
frame of its ring posted and gets them back filled, strictly in the order sent, whatever their sizes.
Nothing here blocks: a ring with no free frame answers None, and `Port.wait` is where waiting happens.

Memory: a frame handed out by `frame()` or `poll()` is the caller's until `send()` or `give_back()`;
from then on UCX reads or writes it until the transfer completes, and only progress completes it.
A message of up to UCX_RNDV_THRESH bytes counts as sent once UCX has copied it, a larger one once the
receiver has it: the ring bounds what a receiver that is behind can be sent only for the larger ones.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from flume_common.lanes import ucx
from flume_common.lanes.frames import Frame
from flume_common.lanes.tags import Tag
from flume_common.wire import Header, Kind

if TYPE_CHECKING:
    from flume_common.lanes.lane import Lane


class Sender:
    """Sends messages of one kind."""

    def __init__(self, lane: Lane[Any], endpoint: Any, kind: Kind, tag: Tag, frames: list[Frame]) -> None:
        self._lane = lane
        self._send = endpoint.tag_send
        self._kind = kind
        self._tag = ucx.lib.UCXXTag(tag)
        self._frames = deque(frames)  # the next to fill comes first
        self._max_bytes = lane.shape.body_bytes(kind)

    @property
    def frames(self) -> tuple[Frame, ...]:
        """The ring, to look at where it lies rather than at what it holds; empty once the lane is closed."""
        return tuple(self._frames)

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way: closing the lane now takes nothing back."""
        return all(frame.request is None or frame.request.completed for frame in self._frames)

    def frame(self, wanted: Frame | None = None) -> Frame | None:
        """The next free frame, its header zeroed; None while the whole ring is in flight.

        The same frame is given until it is sent. `wanted` is a frame of the ring to have as the next, None
        while that one is in flight. Raises LaneDown.
        """
        self._lane.require_up()
        if wanted is not None:
            self._frames.rotate(-self._frames.index(wanted))
        frame = self._frames[0]
        request = frame.request
        if request is None:
            return frame
        if not request.completed:
            return None
        if request.status != ucx.OK:
            self._lane.fail(f"sending {self._kind.name} failed with UCX status {request.status}")
            self._lane.require_up()
        frame.request = None
        frame.header.fill(0)
        return frame

    def send(self, frame: Frame, body_bytes: int) -> None:
        """Send the header and the first `body_bytes` of the body; sets Header.BODY_BYTES.

        Raises LaneDown, and ValueError for a body larger than this kind's largest or for a frame
        other than the one `frame()` gave.
        """
        self._lane.require_up()
        if frame is not self._frames[0] or frame.request is not None:
            raise ValueError(f"not the {self._kind.name} frame that frame() gave")
        if not 0 <= body_bytes <= self._max_bytes:
            raise ValueError(f"a {self._kind.name} body has 0..{self._max_bytes} bytes, not {body_bytes}")
        frame.header[Header.BODY_BYTES] = body_bytes
        frame.request = self._send(frame.array(body_bytes), self._tag)
        self._frames.rotate(-1)

    def detach(self) -> list[Frame]:
        """Let go of the endpoint and the ring; returns the frames in flight. For `Lane.close`."""
        self._send = None
        in_flight = [frame for frame in self._frames if frame.request is not None]
        self._frames.clear()
        return in_flight


class Receiver:
    """Receives messages of one kind."""

    def __init__(self, lane: Lane[Any], endpoint: Any, kind: Kind, tag: Tag, frames: list[Frame]) -> None:
        self._lane = lane
        self._receive = endpoint.tag_recv
        self._kind = kind
        self._tag = ucx.lib.UCXXTag(tag)
        self._posted: deque[Frame] = deque()
        self._given: set[Frame] = set()  # with the user
        self._ring = tuple(frames)
        if lane.alive:
            for frame in frames:
                self._post(frame)

    @property
    def frames(self) -> tuple[Frame, ...]:
        """The ring, to look at where it lies rather than at what it holds; empty once the lane is closed."""
        return self._ring

    def poll(self) -> Frame | None:
        """The oldest message that has arrived and was not polled yet; None if there is none.

        What arrived before the lane went down is still delivered; then LaneDown is raised. After
        `Lane.close` nothing is.
        """
        if not self._posted or not self._posted[0].request.completed:
            self._lane.require_up()
            return None
        frame = self._posted[0]
        if frame.request.status != ucx.OK:
            self._lane.require_up()  # a peer's death cancels receives: that is the better reason
            self._lane.fail(f"receiving {self._kind.name} failed with UCX status {frame.request.status}")
            self._lane.require_up()
        self._posted.popleft()
        frame.request = None
        self._given.add(frame)
        return frame

    def give_back(self, frame: Frame) -> None:
        """Post the frame's buffer again; its contents are UCX's from here. Quiet on a lane that is down.

        Raises ValueError for a frame that `poll()` did not give, or that was given back already.
        """
        if not self._lane.alive:
            self._given.discard(frame)
            return
        if frame not in self._given:
            raise ValueError(f"not a {self._kind.name} frame that poll() gave")
        self._given.remove(frame)
        self._post(frame)

    def detach(self) -> list[Frame]:
        """Let go of the endpoint and the ring; returns the frames in flight. For `Lane.close`."""
        self._receive = None
        in_flight = list(self._posted)
        self._posted.clear()
        self._given.clear()
        self._ring = ()
        return in_flight

    def _post(self, frame: Frame) -> None:
        frame.request = self._receive(frame.whole(), self._tag)
        self._posted.append(frame)
