"""How long this process has been there, and how long the parts of its start took: what log lines carry."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def elapsed_ms() -> int:
    """Since the process was made, the interpreter's own start and all imports included; to 10 ms.

    Asked anew every time, as a forked process has its parent's memory and a start of its own.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    began_s = int(fields[19]) / _TICKS_PER_S  # after boot
    return round(1e3 * (time.clock_gettime(time.CLOCK_BOOTTIME) - began_s))


class Phases:
    """The parts of a start, in order: what each took."""

    def __init__(self) -> None:
        self.began_s = time.monotonic()
        self.took_ms: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began_s = time.monotonic()
        yield
        self.took_ms[name] = 1e3 * (time.monotonic() - began_s)
