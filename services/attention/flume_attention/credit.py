"""Who may be given how much credit: a pure function over numbers of blocks.

Credit is a promise of memory, so it is given out of what is neither held nor promised already, and
never taken back by the node. `wire.Credit` documents the running totals that travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Demand:
    """One lane: credit it has and has not used, and how much of it the weight node would like to have."""

    unused_blocks: int
    want_blocks: int


def grants(free_blocks: int, demands: Sequence[Demand], *, draining: bool) -> list[int]:
    """Blocks to add to each lane's credit.

    Lanes are raised towards what they want from the bottom up, so when memory is short they end up
    with the same unused credit, one block apart at most; no lane gets more than it wants.
    """
    if draining or free_blocks <= 0:
        return [0] * len(demands)
    level = _highest_level(free_blocks, demands)
    given = [_up_to(level, demand) for demand in demands]
    left = free_blocks - sum(given)
    for index, demand in enumerate(demands):
        if left > 0 and _up_to(level + 1, demand) > given[index]:
            given[index] += 1
            left -= 1
    return given


def _up_to(level: int, demand: Demand) -> int:
    return max(0, min(level, demand.want_blocks) - demand.unused_blocks)


def _highest_level(free_blocks: int, demands: Sequence[Demand]) -> int:
    """The highest level of unused credit that all lanes can be raised to."""
    low, high = 0, max((demand.want_blocks for demand in demands), default=0)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(_up_to(middle, demand) for demand in demands) <= free_blocks:
            low = middle
        else:
            high = middle - 1
    return low
