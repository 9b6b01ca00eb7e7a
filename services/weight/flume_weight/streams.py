"""Who listens to which sequence: one queue per live Generate call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flume_weight import messages as m

Event = m.Token | m.Finished | m.Failed


class StreamExists(Exception):
    """A call for this request id is live already."""


class Streams:
    """Deals the engine's messages out to the calls that wait for them."""

    def __init__(self) -> None:
        self._queues: dict[str, asyncio.Queue[Event]] = {}

    def __len__(self) -> int:
        return len(self._queues)

    @contextmanager
    def listen(self, sequence: str) -> Iterator[asyncio.Queue[Event]]:
        """The events of one sequence for as long as the body lasts. Raises StreamExists."""
        if sequence in self._queues:
            raise StreamExists(f"request {sequence} is live already; use another request id")
        queue = self._queues[sequence] = asyncio.Queue()
        try:
            yield queue
        finally:
            del self._queues[sequence]

    def deal(self, event: Event) -> None:
        """Nobody listens any more: dropped, the call was cancelled."""
        queue = self._queues.get(event.sequence)
        if queue is not None:
            queue.put_nowait(event)

    def fail_all(self, failed: Callable[[str], m.Failed]) -> list[m.Failed]:
        """End every stream as `failed` says of its sequence. Returns what was said."""
        said = [failed(sequence) for sequence in self._queues]
        for event in said:
            self.deal(event)
        return said
