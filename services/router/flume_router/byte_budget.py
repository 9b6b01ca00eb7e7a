"""A bound on the bytes of request bodies that a router holds at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flume_router.errors import Overloaded


class Held:
    """Bytes of one body."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._bytes = 0

    def add(self, num_bytes: int) -> None:
        """Raises Overloaded when all bodies together would exceed the budget."""
        self._budget.take(num_bytes)
        self._bytes += num_bytes

    def release(self) -> None:
        self._budget.used_bytes -= self._bytes
        self._bytes = 0


class ByteBudget:
    """Shared by all requests of a router."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0

    @contextmanager
    def hold(self) -> Iterator[Held]:
        """What is held is released with the block, or before."""
        held = Held(self)
        try:
            yield held
        finally:
            held.release()

    def take(self, num_bytes: int) -> None:
        if self.used_bytes + num_bytes > self.limit_bytes:
            raise Overloaded(
                "body_memory", f"this router holds {self.used_bytes} bytes of other requests' bodies already"
            )
        self.used_bytes += num_bytes
