"""What weight nodes left behind when they died: kept for a while, so that others can take it over.

Its blocks stay held and belong to no lane. A claim renews the time, so that what was promised to a
weight node is still there when its PLAN comes. No tensors, no clock of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from flume_attention.ranges import Slot


@dataclass(slots=True)
class Orphan:
    """One sequence's slot."""

    slot: Slot
    weight_node: str  # that had it
    engine: bytes  # that had it, as `port_of` names it: a process, where a name is not
    until_s: float
    claimed_by: str = ""


@dataclass(slots=True)
class Orphans:
    """By sequence key. A sequence that is left behind again replaces what was left of it before."""

    grace_s: float = 30.0
    _orphans: dict[int, Orphan] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._orphans)

    @property
    def held_tokens(self) -> int:
        return sum(orphan.slot.held for orphan in self._orphans.values())

    @property
    def held_blocks(self) -> int:
        return sum(orphan.slot.num_blocks for orphan in self._orphans.values())

    def add(self, weight_node: str, engine: bytes, slots: Iterable[Slot], now_s: float) -> None:
        """Keep these slots from now on. Those that hold nothing, and all without a grace time, are freed."""
        for slot in slots:
            if not slot.held or self.grace_s <= 0:
                slot.release()
                continue
            former = self._orphans.pop(slot.key, None)
            if former is not None:
                former.slot.release()
            self._orphans[slot.key] = Orphan(slot, weight_node, engine, now_s + self.grace_s)

    def claim(self, key: int, weight_node: str, now_s: float) -> Slot | None:
        """Keep this sequence's slot for this weight node, for another grace time. The newest claim counts."""
        orphan = self._orphans.get(key)
        if orphan is None:
            return None
        orphan.claimed_by, orphan.until_s = weight_node, now_s + self.grace_s
        return orphan.slot

    def take(self, key: int, weight_node: str) -> Slot | None:
        """The slot that this weight node has claimed; it is not ours any more."""
        orphan = self._orphans.get(key)
        if orphan is None or orphan.claimed_by != weight_node:
            return None
        del self._orphans[key]
        return orphan.slot

    def expire(self, now_s: float) -> bool:
        """Free those whose time is over. Whether there were any."""
        return self._free(lambda orphan: orphan.until_s <= now_s)

    def free(self, weight_node: str, engine: bytes | None = None) -> bool:
        """Free what this weight node left, or only what that engine of it left. Whether there was any.

        What another one has claimed is not its any more.
        """
        return self._free(
            lambda orphan: (
                orphan.weight_node == weight_node
                and engine in (None, orphan.engine)
                and orphan.claimed_by in ("", weight_node)
            )
        )

    def clear(self) -> None:
        self._free(lambda orphan: True)

    def _free(self, doomed: Callable[[Orphan], bool]) -> bool:
        keys = [key for key, orphan in self._orphans.items() if doomed(orphan)]
        for key in keys:
            self._orphans.pop(key).slot.release()
        return bool(keys)
