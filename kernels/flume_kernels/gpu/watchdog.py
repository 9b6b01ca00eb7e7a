"""A deadline for what a device waits for: when it passes, somebody else than the waiting loop acts.

A step's waits are released by the loop that drives it. Should that loop itself be stuck, or its peer never
answer, nothing on the device would ever end; so a thread of its own does the releasing.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self


class Watchdog:
    """Calls what it was armed with when its time is up. One deadline at a time.

    A context manager that owns one thread. Arming costs no wake-up: the thread sleeps until some deadline it
    once knew and then looks which one holds now.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._deadline = math.inf
        self._wakes_at = math.inf
        self._release: Callable[[], None] | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Nothing is called any more once this returns. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def arm(self, timeout_s: float, release: Callable[[], None]) -> None:
        """Call `release`, once and from the watchdog's thread, in `timeout_s`. Takes the place of what it was
        armed with before."""
        with self._changed:
            self._deadline, self._release = time.monotonic() + timeout_s, release
            if self._deadline < self._wakes_at:
                self._changed.notify()

    def disarm(self) -> None:
        """What it was armed with is not called any more once this returns."""
        with self._changed:
            self._deadline, self._release = math.inf, None

    @contextmanager
    def guard(self, timeout_s: float, release: Callable[[], None]) -> Iterator[None]:
        """Armed for as long as the block lasts."""
        self.arm(timeout_s, release)
        try:
            yield
        finally:
            self.disarm()

    def _run(self) -> None:
        with self._changed:
            while not self._stopping:
                left_s = self._deadline - time.monotonic()
                if left_s <= 0:
                    assert self._release is not None
                    self._release()
                    self._deadline, self._release = math.inf, None
                    continue
                self._wakes_at = self._deadline
                self._changed.wait(None if math.isinf(left_s) else left_s)
