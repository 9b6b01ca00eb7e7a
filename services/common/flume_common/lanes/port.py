"""A port: the UCX worker of one engine process, and the one place where the engine waits.

Transfers move only inside `progress()` and `wait()`: while the engine computes, a large message stands
still. Everything belongs to one thread; nothing here takes a lock.
"""

from __future__ import annotations

import math
import os
import select
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import ucxx._lib.libucxx as ucx

from flume_common.lanes.frames import Allocate, Frame, allocate_pages
from flume_common.lanes.lane import Lane
from flume_common.lanes.tags import Side
from flume_common.wire import LaneShape

DEFAULT_TLS = "tcp,sm,self"


class Port:
    """One UCX worker. A context manager; leaving it closes every lane."""

    def __init__(self, *, tls: str | None = None, spin_s: float = 50e-6) -> None:
        self._spin_s = spin_s
        features = (ucx.Feature.TAG, ucx.Feature.WAKEUP)
        self._context = ucx.UCXContext(_config(tls), feature_flags=features)
        self._worker: Any = ucx.UCXWorker(self._context)
        self._worker.init_blocking_progress_mode()
        self._events = self._worker.epoll_file_descriptor
        self._lanes: list[Lane] = []
        self._retired: list[tuple[Lane, list[Frame]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def address(self) -> bytes:
        """What a peer needs to connect to this port."""
        return bytes(self._worker.address)

    def progress(self) -> None:
        """Move transfers along; never blocks."""
        self._worker.progress()

    def wait(self, ready: Callable[[], bool], timeout_s: float, fds: Sequence[int] = ()) -> bool:
        """Progress until `ready()` is true or one of `fds` is readable (True), or time is up (False).

        Spins for `spin_s` first, then sleeps until UCX or one of `fds` has something.
        """
        progress = self._worker.progress
        progress()
        if ready():
            return True
        now = time.monotonic()
        deadline = now + timeout_s
        spin_until = min(now + self._spin_s, deadline)
        while time.monotonic() < spin_until:
            progress()
            if ready():
                return True
        poller = select.poll()
        for fd in (self._events, *fds):
            poller.register(fd, select.POLLIN)
        while True:
            progress()
            if ready():
                return True
            left_s = deadline - time.monotonic()
            # arm() says no while events are pending: those are taken before anyone sleeps.
            sleep_ms = math.ceil(left_s * 1e3) if left_s > 0 and self._worker.arm() else 0
            events = poller.poll(sleep_ms)
            if any(fd != self._events for fd, _ in events):
                return True
            if left_s <= 0:
                return False

    def connect(
        self,
        peer: str,
        address: bytes,
        shape: LaneShape,
        side: Side,
        *,
        send_lane: int,
        receive_lane: int,
        allocate: Allocate = allocate_pages,
    ) -> Lane:
        """A lane to the port with this address, every receive posted. Does not wait for the peer.

        `peer` is a name for messages. The two lane numbers must be new on both ports: what one end
        calls `send_lane` the other calls `receive_lane`. `allocate(size_bytes)` returns uint8
        [size_bytes] on a page boundary.
        """
        endpoint = ucx.UCXEndpoint.create_from_worker_address(
            self._worker, ucx.UCXAddress.create_from_buffer(address), endpoint_error_handling=True
        )
        lane = Lane(self, endpoint, peer, shape, side, send_lane, receive_lane, allocate)
        self._lanes.append(lane)
        return lane

    def retire(self, lane: Lane, endpoint: Any) -> None:
        """Close a lane's endpoint and keep its memory until nothing can touch it. For `Lane.close`."""
        self._lanes.remove(lane)
        endpoint.close_blocking(10_000_000, 1)
        self._retired.append((lane, lane.in_flight()))
        self._sweep()

    def _sweep(self) -> None:
        self._retired = [
            entry for entry in self._retired if not all(frame.request.completed for frame in entry[1])
        ]

    def close(self) -> None:
        """Close every lane and the worker. Idempotent."""
        for lane in list(self._lanes):
            lane.close()
        self._worker = None
        self._retired.clear()
        self._context = None


def _config(tls: str | None) -> dict[str, str]:
    return {
        "TLS": tls or os.environ.get("UCX_TLS") or DEFAULT_TLS,
        "KEEPALIVE_INTERVAL": "500ms",
        # Without these UCX does not use shared memory on an endpoint that reports its peer's death.
        "MM_ERROR_HANDLING": "y",
    }
