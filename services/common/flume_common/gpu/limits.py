"""Memory that processes of this machine may pin and share."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Limits:
    locked_bytes: int | None  # what a process may lock: `ulimit -l`; None: as much as it likes
    shared_bytes: int  # size of /dev/shm; 0: there is none
    shared_free_bytes: int


def look(shared: Path = SHARED_MEMORY) -> Limits:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    try:
        found = os.statvfs(shared)
    except OSError:
        size = free = 0
    else:
        size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    return Limits(None if soft == resource.RLIM_INFINITY else soft, size, free)
