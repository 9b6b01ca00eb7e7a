"""Logs of local processes are kept within bounds: `ID.log`, before it `ID.log.1`, before that `ID.log.2`.

Processes append to the file they were given and know nothing of this: what is in it is copied away and
the file emptied, so that they go on at its beginning. A line written between the two is lost.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

MAX_BYTES = 16 << 20
OLD = 2
"""How many are kept besides the one that is written."""


def rotate_large(logs: Iterable[Path], max_bytes: int = MAX_BYTES) -> list[Path]:
    """Those above the bound, rotated. What cannot be kept for want of space is dropped."""
    rotated = []
    for log in logs:
        with suppress(OSError):
            if log.stat().st_size > max_bytes:
                rotate(log)
                rotated.append(log)
    return rotated


def rotate(log: Path) -> None:
    """Begin it anew, the file itself staying. Raises OSError when it cannot even be emptied."""
    try:
        _shift(log)
        shutil.copyfile(log, old(log, 1))
    except OSError:
        old(log, 1).unlink(missing_ok=True)  # half of it, perhaps, on a disk that is full
    with log.open("r+b") as file:
        file.truncate(0)


def begin_anew(logs: Iterable[Path]) -> None:
    """For logs that nobody writes: what is there becomes the old one."""
    for log in logs:
        with suppress(OSError):
            if log.stat().st_size:
                _shift(log)
                log.replace(old(log, 1))


def old(log: Path, number: int) -> Path:
    """The `number`th before the one that is written."""
    return log.with_name(f"{log.name}.{number}")


def _shift(log: Path) -> None:
    for number in range(OLD, 1, -1):
        with suppress(FileNotFoundError):
            old(log, number - 1).replace(old(log, number))
