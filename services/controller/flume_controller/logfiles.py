"""Reading what processes printed: the last lines, said for people, and new ones as they come."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Any

import msgspec

_NOT_NEWS = frozenset({"event", "level", "timestamp", "service", "node"})


def last_lines(path: Path, count: int = 8) -> list[str]:
    """The last lines that say something, log records as `event key=value …`; [] without a file."""
    try:
        with path.open(errors="replace") as file:
            recent = deque((line.rstrip() for line in file if line.strip()), maxlen=4 * count)
    except FileNotFoundError:
        return []
    return [part for line in recent for part in readable(line).splitlines()][-count:]


def readable(line: str) -> str:
    """A JSON log record as people read it, other lines as they are."""
    try:
        record = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError:
        return line
    fields = " ".join(f"{key}={value}" for key, value in record.items() if key not in _NOT_NEWS)
    return f"{record.get('event', '')} {fields}".strip()


class LineReader:
    """The whole lines added to a file since the last call. A line without its end yet waits."""

    def __init__(self, path: Path, *, at_end: bool = False) -> None:
        self._path = path
        self._offset = path.stat().st_size if at_end and path.exists() else 0

    def lines(self) -> list[str]:
        try:
            with self._path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._offset:
                    self._offset = 0  # it was emptied, as it had become too long
                file.seek(self._offset)
                fresh = file.read()
        except FileNotFoundError:
            return []
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode(errors="replace").splitlines()
