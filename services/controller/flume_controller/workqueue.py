"""Keys waiting to be worked on, with client-go's rules. asyncio, one event loop.

    queue        keys in the order in which they are to be worked on
    dirty        keys that need work
    processing   keys somebody is at work on

A key that is added while it waits stays there once; one that is added while it is worked on waits until
that is done, and is then worked on again. So one key is never worked on twice at once, and no addition is
lost. Failures are added again after a wait that doubles per key, within a rate for all of them together.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

FIRST_DELAY_S = 0.005
DELAY_CAP_S = 1000.0
RATE_PER_S = 10.0
BURST = 100
BOUNDS_S = tuple(10.0**exponent for exponent in range(-8, 4))
"""Of the histograms of client-go's work queues."""

Clock = Callable[[], float]


class ShutDown(Exception):
    """The queue is shut down and empty."""


@dataclass(slots=True)
class Durations:
    """How long something took each time: a histogram."""

    bounds_s: tuple[float, ...] = BOUNDS_S
    sum_s: float = 0.0
    counts: list[int] = field(init=False)
    """Up to each bound and above the one before; the last is above all of them."""

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds_s) + 1)

    @property
    def count(self) -> int:
        return sum(self.counts)

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds_s, seconds)] += 1
        self.sum_s += seconds


class RateLimiter(Generic[K]):
    """How long to wait before trying again: the longer of the key's own delay and of the rate's for all.

    The key's is 5 ms x 2^failures, at most 1000 s; the rate is 10 per second after a burst of 100.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._failures: dict[K, int] = {}
        self._tokens = float(BURST)
        self._at_s = clock()

    def when_s(self, key: K) -> float:
        """Counts one more failure of `key`."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        # 2.0 ** 30 is far beyond the cap; much larger exponents would overflow.
        own_s = min(FIRST_DELAY_S * 2.0 ** min(failures, 30), DELAY_CAP_S)
        return max(own_s, self._reserve_s())

    def forget(self, key: K) -> None:
        self._failures.pop(key, None)

    def failures(self, key: K) -> int:
        return self._failures.get(key, 0)

    def _reserve_s(self) -> float:
        """Take one token, on credit if need be; seconds until it is really there."""
        now_s = self._clock()
        self._tokens = min(float(BURST), self._tokens + (now_s - self._at_s) * RATE_PER_S)
        self._at_s = now_s
        self._tokens -= 1.0
        return max(0.0, -self._tokens / RATE_PER_S)


class WorkQueue(Generic[K]):
    """See the module."""

    def __init__(self, *, limiter: RateLimiter[K] | None = None, clock: Clock = time.monotonic) -> None:
        self.adds_total = 0
        self.retries_total = 0
        self.queue_duration_seconds = Durations()
        self.work_duration_seconds = Durations()
        self._clock = clock
        self._limiter = limiter or RateLimiter(clock)
        self._queue: deque[K] = deque()
        self._dirty: dict[K, float] = {}  # when it was added
        self._processing: dict[K, float] = {}  # when work began
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._shut = False
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()

    @property
    def depth(self) -> int:
        """Keys that wait for a worker."""
        return len(self._queue)

    @property
    def unfinished_work_seconds(self) -> float:
        """All that is being worked on, since it began."""
        now_s = self._clock()
        # A copy, as metrics ask from another thread.
        return sum(now_s - began_s for began_s in list(self._processing.values()))

    @property
    def longest_running_processor_seconds(self) -> float:
        now_s = self._clock()
        return max((now_s - began_s for began_s in list(self._processing.values())), default=0.0)

    @property
    def shutting_down(self) -> bool:
        return self._shut

    def add(self, key: K) -> None:
        """`key` needs work. Ignored once the queue is shut down."""
        if self._shut or key in self._dirty:
            return
        self.adds_total += 1
        self._dirty[key] = self._clock()
        if key not in self._processing:
            self._put(key)

    def add_after(self, key: K, delay_s: float) -> None:
        """Add it then. Of several waits for one key the shortest counts."""
        if self._shut:
            return
        if delay_s <= 0:
            self.add(key)
            return
        loop = asyncio.get_running_loop()
        waiting = self._timers.get(key)
        if waiting is not None:
            if waiting.when() <= loop.time() + delay_s:
                return
            waiting.cancel()
        self._timers[key] = loop.call_later(delay_s, self._fall_due, key)

    def add_rate_limited(self, key: K) -> float:
        """Add it after the limiter's delay; the delay in seconds."""
        self.retries_total += 1
        delay_s = self._limiter.when_s(key)
        self.add_after(key, delay_s)
        return delay_s

    def forget(self, key: K) -> None:
        """`key` has succeeded, or will not be tried again: its next failure is its first."""
        self._limiter.forget(key)

    def requeues(self, key: K) -> int:
        """Failures since it was last forgotten."""
        return self._limiter.failures(key)

    async def get(self) -> K:
        """The next key; `done` must follow. Raises ShutDown once there will be none."""
        while not self._queue:
            if self._shut:
                raise ShutDown
            self._wake.clear()
            await self._wake.wait()
        key = self._queue.popleft()
        now_s = self._clock()
        self.queue_duration_seconds.add(now_s - self._dirty.pop(key))
        self._processing[key] = now_s
        return key

    def done(self, key: K) -> None:
        """The work that `get` began has ended, well or not. Raises KeyError when there was none."""
        self.work_duration_seconds.add(self._clock() - self._processing.pop(key))
        if key in self._dirty:
            self._put(key)
        self._idle.set()

    def shut_down(self) -> None:
        """Takes nothing new; what waits is still given out, and then `get` raises ShutDown."""
        self._shut = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._wake.set()

    async def shut_down_with_drain(self) -> None:
        """The same, and waits until all that was begun or waited is done."""
        self.shut_down()
        while self._queue or self._processing:
            self._idle.clear()
            await self._idle.wait()

    def _put(self, key: K) -> None:
        self._queue.append(key)
        self._wake.set()

    def _fall_due(self, key: K) -> None:
        del self._timers[key]
        self.add(key)
