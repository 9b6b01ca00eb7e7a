"""What can go wrong on a lane.

* LaneDown    the peer is gone, or either end closed the lane; nothing more will arrive

Misuse (a body larger than the frame, a frame that is not this channel's) is a plain ValueError and
leaves the lane as it was.
"""

from __future__ import annotations


class LaneDown(Exception):
    """The lane carries nothing any more. A new one may be connected to the same peer."""

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"lane to {peer} is down: {reason}")
        self.peer = peer
        self.reason = reason
