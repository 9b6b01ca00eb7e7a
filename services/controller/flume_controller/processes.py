"""Processes that outlive whoever started them, and how to know them again.

A pid alone may have gone to someone else; a pid with its start time and the machine's boot is one
process. Each is recorded in a file, so that a restarted controller, or `flumectl down` after a crash,
finds what runs and signals nothing else. That a start was begun is written before: whoever dies between
the two leaves a process that can be found by its command line. Linux only: it reads /proc and uses pidfds.

Not here: when to start or restart anything (`providers/local.py`, `supervise.py`).
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import msgspec

LEAST_WORDS = 3
"""By which a command line that is cut off in front is still known."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

KILL_S = 5.0
"""How long what was killed may take to be gone; longer only in an uninterruptible call."""


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One process, as written to its file."""

    id: str  # the node's id
    role: str
    pid: int
    start_ticks: int
    """Clock ticks from boot to its start (/proc/PID/stat, field 22)."""
    boot_id: str
    started_at_s: float  # Unix time
    log: str = ""
    stopping_at_s: float | None = None
    """Unix time at which it was told to end; an end before that is a crash."""
    ended: bool = False
    exit_code: int | None = None
    """Negative for a signal, None when unknown or still running."""


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """A start that was begun. It is over with the process's record, or when there is none."""

    id: str
    role: str
    argv: tuple[str, ...]
    log: str = ""
    standby: str = ""  # id of the process that is to become it; empty: a new one


def spawn(
    argv: Sequence[str],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, output appended to `log`. Raises OSError.

    What it writes is for our user alone.
    """
    with open_log(log) as output:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=pass_fds,
            cwd=cwd,
            umask=0o077,
            env=None if env is None else dict(env),
        )


def open_log(path: Path) -> BinaryIO:
    """To be appended to, by more than one process and while it is emptied. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")


def record_of(pid: int, *, id: str, role: str, log: Path | str = "") -> ProcessRecord:
    """The record of a process that runs now. Raises ProcessLookupError."""
    stat = _stat(pid)
    if stat is None:
        raise ProcessLookupError(f"no process {pid}")
    return ProcessRecord(
        id=id,
        role=role,
        pid=pid,
        start_ticks=int(stat[19]),
        boot_id=_boot_id(),
        started_at_s=time.time(),
        log=str(log),
    )


def find(argv: Sequence[str], known: Iterable[int] = ()) -> int | None:
    """The pid of our process that runs this command line and leads its process group, but for `known` ones.

    What stands before a program that replaces itself by it, like numactl, need not be there any more.
    """
    wanted, others = " ".join(argv), set(known)
    for path in Path("/proc").iterdir():
        if not path.name.isdecimal() or (pid := int(path.name)) in others:
            continue
        try:
            line, uid = (path / "cmdline").read_bytes(), path.stat().st_uid
        except (FileNotFoundError, ProcessLookupError):
            continue
        words = line.replace(b"\0", b" ").decode(errors="replace").strip()
        tail = wanted.endswith(f" {words}") and len(words.split()) >= LEAST_WORDS
        stat = _stat(pid)
        if (words == wanted or tail) and uid == os.getuid() and stat and int(stat[2]) == pid:
            return pid
    return None


def is_alive(record: ProcessRecord) -> bool:
    """Whether that very process still runs; one that only waits to be reaped does not."""
    stat = _stat(record.pid)
    return stat is not None and stat[0] not in ("Z", "X") and _is(record, stat)


def runs(pid: int) -> bool:
    """Whether any process has this number, but for one that only waits to be reaped."""
    stat = _stat(pid)
    return stat is not None and stat[0] not in ("Z", "X")


def send(record: ProcessRecord, signal_number: signal.Signals) -> bool:
    """Signal that very process; whether it was there to be signalled."""
    with _pidfd(record) as pidfd:
        if pidfd is None:
            return False
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal_number)
            return True
        return False


def kill_session(record: ProcessRecord) -> None:
    """SIGKILL the process and every child it left in its process group."""
    if _has_its_group(record):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(record.pid, signal.SIGKILL)


async def wait_ended(record: ProcessRecord) -> None:
    """Returns when that very process has ended, at once if it has. Does not reap it."""
    with _pidfd(record) as pidfd:
        if pidfd is None:
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(pidfd)


async def stop(record: ProcessRecord, *, grace_s: float) -> None:
    """SIGTERM, and SIGKILL for the whole session once `grace_s` has passed or the process has ended."""
    send(record, signal.SIGTERM)
    with suppress(TimeoutError):
        async with asyncio.timeout(grace_s):
            await wait_ended(record)
    kill_session(record)
    with suppress(TimeoutError):
        async with asyncio.timeout(KILL_S):
            while _group_runs(record):  # noqa: ASYNC110  (only a process can be waited for, not its group)
                await asyncio.sleep(0.01)


class RecordDir:
    """The process records of one cluster: `ID.json` for each node, and `ID.begun` before there is one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, record: ProcessRecord) -> None:
        """Raises OSError."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        data = msgspec.json.encode(record)
        # Written beside and renamed: whoever reads it sees all of it or the old one.
        draft = self.path / f".{record.id}.{os.getpid()}"
        try:
            draft.write_bytes(data)
            draft.replace(self._file(record.id))
        except OSError as error:
            draft.unlink(missing_ok=True)
            if error.errno not in _NO_SPACE:
                raise
            self._overwrite(record.id, data)
        self._begun(record.id).unlink(missing_ok=True)

    def _overwrite(self, id: str, data: bytes) -> None:
        """On a full disk: into the space that the old record has, which JSON lets us fill up with blanks."""
        with self._file(id).open("r+b") as file:
            file.write(data.ljust(os.fstat(file.fileno()).st_size))

    def begin(self, intent: Intent) -> None:
        """To be called before the process is started."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._begun(intent.id).write_bytes(msgspec.json.encode(intent))

    def begun(self) -> list[Intent]:
        """Starts of which nobody knows how they went. Half-written ones were not begun yet."""
        found = []
        for path in sorted(self.path.glob("*.begun")):
            with suppress(FileNotFoundError, msgspec.DecodeError):
                found.append(msgspec.json.decode(path.read_bytes(), type=Intent))
        return found

    def load(self, id: str) -> ProcessRecord | None:
        with suppress(FileNotFoundError, msgspec.DecodeError):
            return msgspec.json.decode(self._file(id).read_bytes(), type=ProcessRecord)
        return None

    def all(self) -> list[ProcessRecord]:
        names = sorted(path.stem for path in self.path.glob("*.json"))
        return [record for record in map(self.load, names) if record is not None]

    def remove(self, id: str) -> None:
        self._file(id).unlink(missing_ok=True)
        self._begun(id).unlink(missing_ok=True)

    def _begun(self, id: str) -> Path:
        return self.path / f"{id}.begun"

    def _file(self, id: str) -> Path:
        return self.path / f"{id}.json"


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third (state) on, None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 2 :].split()  # the second field, the name, may hold spaces


def _has_its_group(record: ProcessRecord) -> bool:
    """Whether the process group of that number is still its own, though it may have ended itself.

    A pid goes to nobody else while a process group of that number has members.
    """
    stat = _stat(record.pid)
    return record.boot_id == _boot_id() and (stat is None or _is(record, stat))


def _group_runs(record: ProcessRecord) -> bool:
    if not _has_its_group(record):
        return False
    pids = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())
    stats = (stat for stat in map(_stat, pids) if stat is not None)
    return any(int(stat[2]) == record.pid and stat[0] not in ("Z", "X") for stat in stats)


def _is(record: ProcessRecord, stat: Sequence[str]) -> bool:
    return int(stat[19]) == record.start_ticks and record.boot_id == _boot_id()


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@contextmanager
def _pidfd(record: ProcessRecord) -> Iterator[int | None]:
    """A handle that stays with that very process, None when it has ended."""
    try:
        pidfd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        yield None
        return
    try:
        # Compared after opening: from here on the handle cannot come to mean another process.
        yield pidfd if is_alive(record) else None
    finally:
        os.close(pidfd)
