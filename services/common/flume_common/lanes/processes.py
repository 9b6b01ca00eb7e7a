"""Which process is behind a port, and a descriptor that becomes readable the moment it ends.

UCX itself finds out that a peer over shared memory is gone by looking now and then, and takes a killed
process for alive until its parent has reaped it. Where both processes share a kernel and a pid
namespace, a pidfd tells at once. Elsewhere there is none, and UCX's own detection remains.
"""

from __future__ import annotations

import os
import struct
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_LAYOUT = struct.Struct("<36sQQQ")


@dataclass(frozen=True, slots=True)
class Process:
    """A process, named so that no other process on any host has the same name."""

    boot: str  # of the kernel it runs under
    namespace: int  # inode of its pid namespace
    pid: int
    started: int  # clock ticks after boot

    SIZE_BYTES = _LAYOUT.size

    @classmethod
    def this(cls) -> Self:
        return cls(_boot(), _namespace(), os.getpid(), _started(os.getpid()))

    def encode(self) -> bytes:
        return _LAYOUT.pack(self.boot.encode(), self.namespace, self.pid, self.started)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises ValueError."""
        try:
            boot, namespace, pid, started = _LAYOUT.unpack(data)
            return cls(boot.decode(), namespace, pid, started)
        except (struct.error, UnicodeDecodeError) as error:
            raise ValueError(f"not the name of a process: {error}") from error

    def open(self) -> int | None:
        """A pidfd of this process; None when it cannot be watched from here.

        Raises ProcessLookupError when it should be here and is not.
        """
        us = Process.this()
        if (self.boot, self.namespace) != (us.boot, us.namespace) or not hasattr(os, "pidfd_open"):
            return None
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            raise ProcessLookupError(f"process {self.pid} ended") from None
        except OSError:  # a sandbox that forbids pidfds
            return None
        # Only now: while the descriptor is open the number cannot pass to another process.
        if _started(self.pid) != self.started:
            os.close(fd)
            raise ProcessLookupError(f"process {self.pid} ended")
        return fd


def on_this_host(address: bytes) -> bool:
    """Whether the process behind a port with this address runs under our kernel; not, for what is none."""
    try:
        return Process.decode(address[: Process.SIZE_BYTES]).boot == _boot()
    except ValueError:
        return False


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # a sandbox without it: a name that nobody shares
        return str(uuid.uuid4())


def _namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def _started(pid: int) -> int:
    """Field 22 of /proc/<pid>/stat; 0 when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(stat.rpartition(")")[2].split()[19])
