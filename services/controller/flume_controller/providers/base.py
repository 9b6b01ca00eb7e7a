"""What the controller asks of whatever runs attention nodes: processes here, pods elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Instance:
    """One attention node as its provider knows it, registered or not."""

    id: str
    pid: int
    started_at_s: float  # Unix time
    running: bool = True
    stopping: bool = False  # told to end
    exit_code: int | None = None
    log: str = ""


class Provider(Protocol):
    """Runs attention nodes. Every method is idempotent and none waits for a node to change its state."""

    async def instances(self) -> Sequence[Instance]:
        """What runs, and what has ended and is not forgotten yet."""

    async def start(self, node: str) -> None:
        """Raises OSError when it cannot be started."""

    async def stop(self, node: str) -> None:
        """Asks it to end, and ends it after a grace."""

    async def forget(self, node: str) -> None:
        """Drops an ended instance, so that its id may be used again."""

    async def changed(self) -> None:
        """Returns once an instance has ended since the last call."""
