"""Ranges that were pulled from another node and wait for the weight node that asked for them.

It takes them with its next PLAN (`wire.Op.TAKE`). What nobody takes, because the weight node died or the
sequence ended meanwhile, is freed after a while. No tensors, no clock of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flume_attention.ranges import Range

_Name = tuple[str, int, int]  # weight node, sequence key, start


@dataclass(slots=True)
class Arrivals:
    """By weight node, sequence and start. One that arrives again replaces the former."""

    grace_s: float = 30.0
    _waiting: dict[_Name, tuple[Range, float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def held_tokens(self) -> int:
        return sum(item.length for item, _ in self._waiting.values())

    def add(self, weight_node: str, key: int, item: Range, now_s: float) -> None:
        """A whole range, closed, whose blocks are ours until somebody takes it."""
        assert item.closed
        name = weight_node, key, item.start
        if name in self._waiting:
            self._free([name])
        self._waiting[name] = item, now_s + self.grace_s

    def take(self, weight_node: str, key: int, start: int) -> Range | None:
        """It is not ours any more."""
        item, _ = self._waiting.pop((weight_node, key, start), (None, 0.0))
        return item

    def expire(self, now_s: float) -> bool:
        """Free those whose time is over. Whether there were any."""
        return self._free([name for name, (_, until_s) in self._waiting.items() if until_s <= now_s])

    def free(self, weight_node: str) -> bool:
        """Free those that this weight node asked for. Whether there were any."""
        return self._free([name for name in self._waiting if name[0] == weight_node])

    def clear(self) -> None:
        self._free(list(self._waiting))

    def _free(self, names: Sequence[_Name]) -> bool:
        for name in names:
            item, _ = self._waiting.pop(name)
            item.release()
        return bool(names)
