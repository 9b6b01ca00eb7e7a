"""A lane's credit as the weight node keeps it: how many blocks it may still take on that node.

Totals only grow, so the ledger and the node agree whatever is in flight (`flume_common.wire.Credit`).
"""

from __future__ import annotations

from dataclasses import dataclass

from flume_common.wire import Credit


@dataclass(slots=True)
class CreditLedger:
    """Blocks granted, given back and taken on one lane since it was attached."""

    capacity_blocks: int
    granted_blocks: int = 0
    returned_blocks: int = 0
    taken_blocks: int = 0
    free_blocks: int = 0  # of the node, as it last said
    draining: bool = False
    asked_blocks: int = 0  # the want of the last PLAN

    @property
    def unused_blocks(self) -> int:
        return self.granted_blocks - self.returned_blocks - self.taken_blocks

    @property
    def reachable_blocks(self) -> int:
        """Unused credit and what the node could still grant, as far as it has said."""
        return max(0, self.unused_blocks) + (0 if self.draining else max(0, self.free_blocks))

    @property
    def exhausted(self) -> bool:
        """Nothing in hand and nothing to be had, as far as the node has said."""
        return self.reachable_blocks == 0

    def hear(self, credit: Credit) -> None:
        """Apply a CREDIT message."""
        self.granted_blocks = max(self.granted_blocks, credit.granted_blocks)
        self.capacity_blocks = credit.capacity_blocks
        self.free_blocks = credit.free_blocks
        self.draining = credit.draining

    def take(self, blocks: int) -> None:
        self.taken_blocks += blocks

    def give_back_beyond(self, keep_blocks: int) -> int:
        """Return unused credit above `keep_blocks`; the number returned now."""
        surplus = max(0, self.unused_blocks - keep_blocks)
        self.returned_blocks += surplus
        return surplus
