"""A port: all lanes of one engine process, and the one place where the engine waits.

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
from functools import partial
from typing import Any, Self

from flume_common.lanes import ucx
from flume_common.lanes.berth import Berth
from flume_common.lanes.frames import USUAL, Allocate, Frame, Rings, S, allocate_pages
from flume_common.lanes.lane import Lane
from flume_common.lanes.processes import Process
from flume_common.lanes.tags import Side

_BUSY_ROUNDS = 100  # a few hundred µs
_WAKE_PAUSE_S = 200e-6
_LONGEST_SLEEP_S = 3600.0
_NAME_BYTES = 8
_PORT_BYTES = Process.SIZE_BYTES + _NAME_BYTES


class Port:
    """A context manager; leaving it closes every lane.

    A lane runs over the berth that `berth` made for it. Lanes that were given none share the one of
    `address`, and with it the fate of any of their peers (see `lanes.berth`).

    `tls` is UCX's list of transports, by default UCX_TLS or "tcp,sm,self". `host` is the address of ours at
    which peers of other machines reach us: no other card is used; empty: all are. `spin_s` is how long
    `wait` looks for work before it sleeps. Measured on two cores (bench/lane_hop.py, 2.4 KB round trip
    over shared memory): 10 µs when the answer comes within the spin and 30 to 70 µs when both sides
    sleep. A weight process and two attention processes that compute 100 to 600 µs per layer on two
    cores: 50 µs of spinning makes a step 2 to 10 % shorter than none, as the spin yields its core each
    time round; without yielding it is up to 30 % longer.
    """

    def __init__(self, *, tls: str | None = None, spin_s: float = 50e-6, host: str = "") -> None:
        self._spin_s = spin_s
        self._host = host
        self._name = os.urandom(_NAME_BYTES)
        self._tls = tls
        self._context: Any = ucx.make_context(tls, host)
        self._spare: Berth | None = Berth(self._context)  # made before anybody waits for it
        self._shared: Berth | None = None
        self._own: dict[int, Berth] = {}  # by the number of the lane that each is for
        self._berths: tuple[Berth, ...] = ()  # that peers know, a new tuple whenever lanes come or go

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def address(self) -> bytes:
        """What a peer needs to connect to this port by the berth that is shared."""
        return self._address_of(self._share())

    def berth(self, receive_lane: int) -> bytes:
        """What the peer of the lane with this number needs to connect: the address of a berth for it alone.

        `connect` with the same number takes the berth, `leave` gives it up.
        """
        berth = self._own[receive_lane] = self._make()
        self._rearrange()
        return self._address_of(berth)

    def leave(self, receive_lane: int) -> None:
        """There will be no lane with this number."""
        if (berth := self._own.pop(receive_lane, None)) is not None:
            berth.close()
            self._rearrange()

    def _address_of(self, berth: Berth) -> bytes:
        return Process.this().encode() + self._name + berth.address

    def _share(self) -> Berth:
        if self._shared is None:
            self._shared = self._make()
            self._rearrange()
        return self._shared

    def _make(self) -> Berth:
        berth, self._spare = self._spare, None
        if berth is not None:
            return berth
        try:
            return Berth(self._context)
        except ucx.NoDevice:
            # A context knows the network cards there were when it was made, and one of them is gone since.
            self._context = ucx.make_context(self._tls, self._host)
            return Berth(self._context)

    def _rearrange(self) -> None:
        shared = () if self._shared is None else (self._shared,)
        self._berths = (*self._own.values(), *shared)

    def progress(self) -> None:
        """Move transfers along; never blocks."""
        for berth in self._berths:
            berth.worker.progress()

    def wait(self, ready: Callable[[], bool], timeout_s: float, fds: Sequence[int] = ()) -> bool:
        """Progress until `ready()` is true or one of `fds` is readable (True), or time is up (False).

        Looks for `spin_s`, then sleeps until UCX, a peer's end or one of `fds` wakes it. `ready` is
        asked again after each of these; what it raises (LaneDown, say) passes through.
        """
        progress = self.progress
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
        berths, watched, poller = self._look_at(fds)
        busy_rounds = wakes = 0
        while True:
            self.progress()
            if ready():
                return True
            if berths is not self._berths:
                berths, watched, poller = self._look_at(fds)
            left_s = deadline - time.monotonic()
            busy_rounds = 0 if all(berth.worker.arm() for berth in berths) else busy_rounds + 1
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
                elif fd in fds:
                    return True
            if left_s <= 0:
                return False

    def _look_at(self, fds: Sequence[int]) -> tuple[tuple[Berth, ...], dict[int, Lane[Any]], select.poll]:
        """The berths to arm, the lanes whose process is watched, and what wakes us."""
        lanes = [lane for berth in self._berths for lane in berth.lanes if lane.alive]
        watched = {lane.process_fd: lane for lane in lanes if lane.process_fd is not None}
        poller = select.poll()
        for fd in (*(berth.events for berth in self._berths), *watched, *fds):
            poller.register(fd, select.POLLIN)
        return self._berths, watched, poller

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
        """A lane to the berth with this address, every receive posted. Does not wait for the peer.

        `peer` is a name for messages. What one end calls `send_lane` the other calls `receive_lane`;
        a port must never use a `receive_lane` twice, as messages for a closed one are thrown away.
        `allocate(size_bytes)` returns uint8 [size_bytes] on a page boundary. `rings` are how many frames
        this end has of some kinds, where another number than the usual is wanted. The lane to a peer that
        is known to be gone is down from the start.

        Raises ValueError for an address, a lane number, a block or a ring that cannot be one; the berth of
        this lane, if it had one, is then given up.
        """
        berth = self._own.get(receive_lane) or self._share()
        berth.tidy()
        process, worker = address[: Process.SIZE_BYTES], address[_PORT_BYTES:]
        with ExitStack() as undo:
            undo.callback(self.leave, receive_lane)
            if not worker:
                raise ValueError(f"an address has more than {len(address)} bytes")
            try:
                process_fd = Process.decode(process).open()
                undo.callback(_close, process_fd)
                endpoint = ucx.connect(berth.worker, worker)
            except ProcessLookupError as error:
                process_fd, endpoint = None, ucx.Nowhere(str(error))
            retire = partial(self._retire, berth, receive_lane)
            lane = Lane(
                retire, endpoint, process_fd, peer, shape, side, send_lane, receive_lane, allocate, rings
            )
            undo.pop_all()
        berth.lanes.append(lane)
        self._rearrange()
        return lane

    def _retire(
        self, berth: Berth, receive_lane: int, lane: Lane[Any], endpoint: Any, in_flight: list[Frame]
    ) -> None:
        """A lane ends: close its endpoint, and its berth if that was its own."""
        berth.retire(lane, endpoint, receive_lane, in_flight)
        self.leave(receive_lane)
        self._rearrange()

    def close(self) -> None:
        """Close every lane and every worker. Idempotent."""
        while self._own:
            self._own.popitem()[1].close()
        for berth in (self._shared, self._spare):
            if berth is not None:
                berth.close()
        self._shared = self._spare = None
        self._rearrange()


def port_of(address: bytes) -> bytes:
    """Names the port that has the berth with this address, as long as the port is there."""
    return address[:_PORT_BYTES]


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
