"""This machine's memory, and sizes that people give of it: `512MiB`, `2GiB`, `25%`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import psutil

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    prefix + end: 1 << (10 * power)
    for power, prefix in enumerate(("Ki", "Mi", "Gi", "Ti"), start=1)
    for end in ("", "B")
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*|%)\s*")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Memory:
    """Of the machine, or of the container where that has less; or of a GPU."""

    total_bytes: int
    free_bytes: int


def measure(cgroup: Path = _CGROUP) -> Memory:
    """What this process could use now, without swap. A container's limit counts where there is one."""
    machine = psutil.virtual_memory()
    limit, used = _read(cgroup / "memory.max"), _read(cgroup / "memory.current")
    if limit is None or limit > machine.total:
        return Memory(machine.total, machine.available)
    return Memory(limit, max(0, min(machine.available, limit - (used or 0))))


def _read(path: Path) -> int | None:
    """A number in a control group's file; None where there is no such file or no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def kv_bytes(text: str, memory: Memory) -> int:
    """`512MiB`, `2GiB`, `1.5GB`, plain bytes, or `25%` of what is free now.

    Raises ValueError naming --kv-memory for what is none of these, is nothing, or is more than there is.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match[2] != "%" and match[2] not in _UNITS):
        raise ValueError(f"--kv-memory {text!r}: give a size like 512MiB or 2GiB, or a share like 25%")
    number = float(match[1])
    if match[2] == "%":
        if not 0 < number <= 100:
            raise ValueError(f"--kv-memory {text!r}: a share must be above 0% and at most 100%")
        return int(memory.free_bytes * number / 100)
    size = int(number * _UNITS[match[2]])
    if size < 1:
        raise ValueError(f"--kv-memory {text!r} is no memory at all")
    if size > memory.total_bytes:
        raise ValueError(f"--kv-memory {text!r} is {size} bytes, there are {memory.total_bytes}")
    return size
