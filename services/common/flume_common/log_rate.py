"""A bound on how fast one process logs, so that no fault, however often it repeats, fills a disk or a core.

Each kind of line (its logger, level and event, or the first line of its message) has a bucket of its own,
and all lines together have another. What finds its bucket empty is counted instead of written, and the
count follows as `log_lines_suppressed`. Lines of other kinds come through meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

SUMMARY = "log_lines_suppressed"
SUMMARY_EVERY_S = 10.0
MAX_KINDS = 512
"""Of lines that are told apart; messages that have names in them could be any number."""
_KIND_CHARACTERS = 100


class Rate(NamedTuple):
    per_s: float
    burst: int


USUAL = Rate(50, 200)
"""Of one kind of line. A router logs each request."""
TROUBLE = Rate(5, 50)
"""From warnings on, which may bring a traceback each."""
ALTOGETHER = Rate(200, 1000)


class Bucket:
    """Tokens that come at a rate, up to a burst."""

    __slots__ = ("_at_s", "_rate", "_tokens")

    def __init__(self, rate: Rate, now_s: float) -> None:
        self._rate = rate
        self._tokens = float(rate.burst)
        self._at_s = now_s

    def take(self, now_s: float) -> bool:
        """Whether there was one."""
        grown = self._tokens + (now_s - self._at_s) * self._rate.per_s
        self._tokens, self._at_s = min(grown, float(self._rate.burst)), now_s
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


class Kind(NamedTuple):
    logger: str
    level: int
    event: str


@dataclass(slots=True)
class _Line:
    """One kind of line: what it may still log, and what it was not let."""

    bucket: Bucket
    suppressed: int = 0
    told_at_s: float = 0.0


class LogRateLimit(logging.Filter):
    """A filter of a handler: what it refuses is never formatted.

    `summarise(kind, count)` is called for what was not logged.
    """

    def __init__(
        self, summarise: Callable[[Kind, int], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._summarise = summarise
        self._clock = clock
        self._lock = threading.Lock()
        self._all = Bucket(ALTOGETHER, clock())
        self._lines: dict[Kind, _Line] = {}
        self._num_suppressed = 0  # of all kinds, not told yet

    def filter(self, record: logging.LogRecord) -> bool:
        kind = kind_of(record)
        if kind.event == SUMMARY:
            return True
        now_s = self._clock()
        with self._lock:
            line = self._line(kind, now_s)
            passes = line.bucket.take(now_s) and self._all.take(now_s)
            if not passes:
                line.suppressed += 1
                self._num_suppressed += 1
            due = self._due(now_s) if passes and self._num_suppressed else []
        self._tell(due)
        return passes

    def flush(self) -> None:
        """Say what has not been said yet, at the end of the process."""
        with self._lock:
            due = self._due(float("inf"))
        self._tell(due)

    def _line(self, kind: Kind, now_s: float) -> _Line:
        if kind not in self._lines and len(self._lines) >= MAX_KINDS:
            kind = Kind(kind.logger, kind.level, "")
        line = self._lines.get(kind)
        if line is None:
            rate = TROUBLE if kind.level >= logging.WARNING else USUAL
            line = self._lines[kind] = _Line(Bucket(rate, now_s), told_at_s=now_s - SUMMARY_EVERY_S)
        return line

    def _due(self, now_s: float) -> list[tuple[Kind, int]]:
        due = []
        for kind, line in self._lines.items():
            if line.suppressed and now_s - line.told_at_s >= SUMMARY_EVERY_S:
                due.append((kind, line.suppressed))
                self._num_suppressed -= line.suppressed
                line.suppressed, line.told_at_s = 0, now_s
        return due

    def _tell(self, due: list[tuple[Kind, int]]) -> None:
        for kind, count in due:
            self._summarise(kind, count)


def kind_of(record: logging.LogRecord) -> Kind:
    """Ours by their event; others by the first line of their message, before its arguments are put in."""
    message = record.msg
    event = message.get("event", "") if isinstance(message, dict) else message
    return Kind(record.name, record.levelno, str(event).partition("\n")[0][:_KIND_CHARACTERS])
