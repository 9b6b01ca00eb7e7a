"""How long this process has been there: what the log lines of its start carry."""

from __future__ import annotations

import os
import time
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def elapsed_ms() -> int:
    """Since the process was made, the interpreter's own start and all imports included; to 10 ms.

    Asked anew every time, as a forked process has its parent's memory and a start of its own.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    began_s = int(fields[19]) / _TICKS_PER_S  # after boot
    return round(1e3 * (time.clock_gettime(time.CLOCK_BOOTTIME) - began_s))
