"""A berth: one UCX worker, the queue that peers' messages come in by, and the lanes that run over it.

Over shared memory a worker has one receive queue for all its peers. Whoever sends reserves an element of it,
fills it and then marks it as filled; where a process is killed in between, the element stays as it is, and
nothing that comes after it is ever read, from whomever (UCX 1.21, `uct_mm_ep_am_common_send`). Of processes
that were killed while they sent without a pause, one in fifteen left the queue like that, and an attention
node beside a weight engine one in thirty. So peers that may die alone have a berth each.

A berth takes 5.5 ms to make, 4 MiB of shared memory and 11 descriptors, and 0.2 µs of every look.
"""

from __future__ import annotations

from typing import Any

from flume_common.lanes import ucx
from flume_common.lanes.frames import Frame
from flume_common.lanes.lane import Lane
from flume_common.lanes.strays import Strays


class Berth:
    """A UCX worker. `Port` makes them, moves them on and closes them."""

    def __init__(self, context: Any) -> None:
        self.worker: Any = ucx.make_worker(context)
        self.events: int = self.worker.epoll_file_descriptor  # readable when an armed worker has work
        self.lanes: list[Lane[Any]] = []
        self._strays = Strays(self.worker)
        self._cancelled: list[Frame] = []  # frames of closed lanes that UCX may still touch

    @property
    def address(self) -> bytes:
        """The worker's part of what a peer needs to connect."""
        return bytes(self.worker.address)

    def retire(self, lane: Lane[Any], endpoint: Any, receive_lane: int, in_flight: list[Frame]) -> None:
        """Close a lane's endpoint and keep its memory until nothing can touch it."""
        if lane in self.lanes:
            self.lanes.remove(lane)
        endpoint.close_blocking()
        self._cancelled += in_flight
        self._strays.expect(receive_lane)
        self.tidy()

    def tidy(self) -> None:
        """Throw away what came for closed lanes."""
        self.worker.progress()
        self._strays.collect()
        self._cancelled = [frame for frame in self._cancelled if not frame.request.completed]

    def close(self) -> None:
        """Close every lane and the worker, which waits for nobody."""
        for lane in list(self.lanes):
            lane.close()
        self._strays.close()
        for frame in self._cancelled:
            frame.request = None
        self.worker = None  # a transfer holds the worker, the worker may hold a frame's memory
        self._cancelled.clear()
