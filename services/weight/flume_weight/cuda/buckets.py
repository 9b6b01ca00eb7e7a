"""Which captured size a batch runs in. Pure."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

from flume_weight.cuda.errors import BatchTooLarge


@dataclass(frozen=True, slots=True)
class StepSize:
    """What a step is captured for. Raises ValueError unless the microbatches share the rows evenly."""

    rows: int
    microbatches: int = 1

    def __post_init__(self) -> None:
        if self.rows < 1 or self.microbatches < 1 or self.rows % self.microbatches:
            raise ValueError(f"{self.rows} rows in {self.microbatches} microbatches")

    @property
    def microbatch_rows(self) -> int:
        return self.rows // self.microbatches


@dataclass(frozen=True, slots=True)
class Buckets:
    """Rows of the captured steps, rising. Raises ValueError for sizes that do not rise from 1 or more."""

    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.rows or self.rows[0] < 1 or any(a >= b for a, b in pairwise(self.rows)):
            raise ValueError(f"buckets must rise from 1 or more, got {self.rows}")

    @classmethod
    def up_to(cls, most: int) -> Buckets:
        """1, 2, 4, 8, then every multiple of 8: no batch of more than 8 is padded by 8 rows or more."""
        small = [rows for rows in (1, 2, 4) if rows < most]
        return cls((*small, *range(8, most, 8), most))

    def of(self, rows: int) -> int:
        """The smallest bucket that holds `rows`. Raises BatchTooLarge."""
        at = bisect_left(self.rows, rows)
        if at == len(self.rows):
            raise BatchTooLarge(rows, self.rows[-1])
        return self.rows[at]
