"""Whether long-lived processes grow: their resident memory after each round, first third against last."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from processes import MIB, Seen

LEAST_SAMPLES = 9
"""A process that was there for fewer rounds is not judged; the faults that kill it see to that."""
LIMIT_BYTES = 12 * MIB
LIMIT_RATIO = 0.05
"""Growth between the thirds that is allowed: the larger of the two. Allocators keep some of what they got,
and a weight engine may have one lane, thus 35 MiB of buffers, more or less at the moment of a sample."""


@dataclass(frozen=True)
class Growth:
    name: str
    series: tuple[int, ...]  # bytes after each round

    @property
    def first_bytes(self) -> float:
        return median(self.series[: len(self.series) // 3])

    @property
    def last_bytes(self) -> float:
        return median(self.series[-(len(self.series) // 3) :])

    @property
    def grown_bytes(self) -> float:
        return self.last_bytes - self.first_bytes

    @property
    def limit_bytes(self) -> float:
        return max(LIMIT_BYTES, LIMIT_RATIO * self.first_bytes)

    @property
    def is_leak(self) -> bool:
        return self.grown_bytes > self.limit_bytes

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.first_bytes / MIB:.1f} -> {self.last_bytes / MIB:.1f} MiB over "
            f"{len(self.series)} rounds (limit +{self.limit_bytes / MIB:.0f})"
        )


class Memory:
    """Samples by process: one that was started anew begins anew."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, int, float], list[int]] = {}

    def sample(self, seen: list[Seen]) -> None:
        for item in seen:
            self._series.setdefault((item.name, item.pid, item.started_at_s), []).append(item.rss_bytes)

    def growths(self) -> list[Growth]:
        """Of the processes that can be judged, most grown first."""
        found = [
            Growth(name, tuple(series))
            for (name, _, _), series in self._series.items()
            if len(series) >= LEAST_SAMPLES
        ]
        return sorted(found, key=lambda growth: -growth.grown_bytes)
