"""A port: the UCX worker of one engine process, and the one place where the engine waits.

Transfers move only inside `progress()` and `wait()`. A message of up to UCX_RNDV_THRESH bytes is on its
way when `send` returns; a larger one needs both ends to progress a few times, so while either computes
it stands still, and moves on unharmed afterwards. Everything belongs to one thread; nothing takes a lock.
"""

from __future__ import annotations

import math
import os
import select
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self

from flume_common.lanes import ucx
from flume_common.lanes.frames import USUAL, Allocate, Frame, Rings, S, allocate_pages
from flume_common.lanes.lane import Lane
from flume_common.lanes.processes import Process
from flume_common.lanes.strays import Strays
from flume_common.lanes.tags import Side

_BUSY_ROUNDS = 100  # a few hundred µs
_WAKE_PAUSE_S = 200e-6
_LONGEST_SLEEP_S = 3600.0


class Port:
    """One UCX worker. A context manager; leaving it closes every lane.

    `tls` is UCX's list of transports, by default UCX_TLS or "tcp,sm,self". `spin_s` is how long
    `wait` looks for work before it sleeps. Measured on two cores (bench/lane_hop.py, 2.4 KB round trip
    over shared memory): 10 µs when the answer comes within the spin and 30 to 70 µs when both sides
    sleep. A weight process and two attention processes that compute 100 to 600 µs per layer on two
    cores: 50 µs of spinning makes a step 2 to 10 % shorter than none, as the spin yields its core each
    time round; without yielding it is up to 30 % longer.
    """

    def __init__(self, *, tls: str | None = None, spin_s: float = 50e-6) -> None:
        self._spin_s = spin_s
        self._worker: Any = ucx.make_worker(tls)
        self._events: int = self._worker.epoll_file_descriptor
        self._strays = Strays(self._worker)
        self._lanes: list[Lane[Any]] = []
        self._cancelled: list[Frame] = []  # frames of closed lanes that UCX may still touch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def address(self) -> bytes:
        """What a peer needs to connect to this port."""
        return Process.this().encode() + bytes(self._worker.address)

    def progress(self) -> None:
        """Move transfers along; never blocks."""
        self._worker.progress()

    def wait(self, ready: Callable[[], bool], timeout_s: float, fds: Sequence[int] = ()) -> bool:
        """Progress until `ready()` is true or one of `fds` is readable (True), or time is up (False).

        Looks for `spin_s`, then sleeps until UCX, a peer's end or one of `fds` wakes it. `ready` is
        asked again after each of these; what it raises (LaneDown, say) passes through.
        """
        progress = self._worker.progress
        progress()
        if ready():
            return True
        now = time.monotonic()
        deadline = now + timeout_s
        spin_until = min(now + self._spin_s, deadline)
        while time.monotonic() < spin_until:
            os.sched_yield()  # the peer may want this very core
            progress()
            if ready():
                return True
        return self._sleep(ready, deadline, fds)

    def _sleep(self, ready: Callable[[], bool], deadline: float, fds: Sequence[int]) -> bool:
        poller = select.poll()
        watched = self._watched()
        for fd in (self._events, *watched, *fds):
            poller.register(fd, select.POLLIN)
        busy_rounds = wakes = 0
        while True:
            self._worker.progress()
            if ready():
                return True
            left_s = deadline - time.monotonic()
            busy_rounds = 0 if self._worker.arm() else busy_rounds + 1
            if wakes > _BUSY_ROUNDS and not busy_rounds:
                # Over TCP a full socket of a stopped peer can wake us without end and to no purpose.
                time.sleep(_WAKE_PAUSE_S)
            events = poller.poll(_sleep_ms(left_s, busy_rounds))
            if events or busy_rounds:
                wakes += 1
            else:
                wakes = 0
            for fd, _ in events:
                if fd in watched:
                    watched.pop(fd).fail("its process ended")
                    poller.unregister(fd)
                elif fd != self._events:
                    return True
            if left_s <= 0:
                return False

    def _watched(self) -> dict[int, Lane[Any]]:
        lanes = [lane for lane in self._lanes if lane.process_fd is not None and lane.alive]
        return {lane.process_fd: lane for lane in lanes if lane.process_fd is not None}

    def connect(
        self,
        peer: str,
        address: bytes,
        shape: S,
        side: Side,
        *,
        send_lane: int,
        receive_lane: int,
        allocate: Allocate = allocate_pages,
        rings: Rings = USUAL,
    ) -> Lane[S]:
        """A lane to the port with this address, every receive posted. Does not wait for the peer.

        `peer` is a name for messages. What one end calls `send_lane` the other calls `receive_lane`;
        a port must never use a `receive_lane` twice, as messages for a closed one are thrown away.
        `allocate(size_bytes)` returns uint8 [size_bytes] on a page boundary. `rings` are how many frames
        this end has of some kinds, where another number than the usual is wanted. The lane to a peer that
        is known to be gone is down from the start.

        Raises ValueError for an address, a lane number, a block or a ring that cannot be one.
        """
        self._tidy()
        process, worker = address[: Process.SIZE_BYTES], address[Process.SIZE_BYTES :]
        if not worker:
            raise ValueError(f"an address has more than {len(address)} bytes")
        with ExitStack() as undo:
            try:
                process_fd = Process.decode(process).open()
                undo.callback(_close, process_fd)
                endpoint = ucx.connect(self._worker, worker)
            except ProcessLookupError as error:
                process_fd, endpoint = None, ucx.Nowhere(str(error))
            lane = Lane(
                self, endpoint, process_fd, peer, shape, side, send_lane, receive_lane, allocate, rings
            )
            undo.pop_all()
        self._lanes.append(lane)
        return lane

    def retire(self, lane: Lane[Any], endpoint: Any, receive_lane: int, in_flight: list[Frame]) -> None:
        """Close a lane's endpoint and keep its memory until nothing can touch it. For `Lane.close`."""
        if lane in self._lanes:
            self._lanes.remove(lane)
        endpoint.close_blocking()
        self._cancelled += in_flight
        self._strays.expect(receive_lane)
        self._tidy()

    def _tidy(self) -> None:
        self._worker.progress()
        self._strays.collect()
        self._cancelled = [frame for frame in self._cancelled if not frame.request.completed]

    def close(self) -> None:
        """Close every lane and the worker. Idempotent."""
        if self._worker is None:
            return
        for lane in list(self._lanes):
            lane.close()
        self._strays.close()
        for frame in self._cancelled:
            frame.request = None
        self._worker = None  # a transfer holds the worker, the worker may hold a frame's memory
        self._cancelled.clear()


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def _sleep_ms(left_s: float, busy_rounds: int) -> int:
    """How long to sleep when UCX refused to be slept on `busy_rounds` times in a row.

    It refuses while events are pending, which one progress clears, and while it has messages it cannot
    place because a peer's queue is full. Then that peer must run, perhaps on this core (without
    yielding, 2 MB took 3 ms); and if it does not for a while, nothing wakes us when there is room.
    """
    if left_s <= 0:
        return 0
    if not busy_rounds:
        return math.ceil(min(left_s, _LONGEST_SLEEP_S) * 1e3)
    os.sched_yield()
    return 0 if busy_rounds < _BUSY_ROUNDS else 1
