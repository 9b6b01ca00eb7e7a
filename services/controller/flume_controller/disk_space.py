"""Whether there is room on the disk that a directory is on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

ROOM_BYTES = 4 << 20
"""With less than this, what needs to grow a file is not worth a try."""


class DiskSpace(NamedTuple):
    free_bytes: int  # for our user
    free_files: int

    @property
    def full(self) -> bool:
        return self.free_bytes < ROOM_BYTES or self.free_files == 0


def disk_space(directory: Path) -> DiskSpace:
    """Raises OSError where there is no such directory."""
    found = os.statvfs(directory)
    # Some file systems have no fixed number of files and say 0 of 0.
    files = found.f_favail if found.f_files else 1
    return DiskSpace(found.f_bavail * found.f_frsize, files)


def full_disk(directory: Path) -> str:
    """What to say of the disk that `directory` is on when it is full; empty while there is room."""
    try:
        space = disk_space(directory)
    except OSError:
        return ""
    if not space.full:
        return ""
    return f"the disk of {directory} is full ({space.free_bytes >> 10} KiB free): free some space"
