"""How long this process has been there: what the log lines of its start carry."""

from __future__ import annotations

import time

import psutil

_began_s = psutil.Process().create_time()


def elapsed_ms() -> int:
    """Since the process was made, the interpreter's own start and all imports included."""
    return round(1e3 * (time.time() - _began_s))
