"""Attention nodes started ahead of need: all that takes time is done, but they have no id and joined nothing.

They hold no keys or values and count for nobody until one is told to become a node. Then it is another's
turn to be started, a while later, so that the two do not compete for the machine. On a GPU each has its KV
memory from the start, or it might not be there when the node is needed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import structlog
from flume_common.backoff import Backoff
from flume_common.standby import StandbyGone, call
from flume_common.zygote import abstract_name

from flume_controller import processes
from flume_controller.observe import free_ids
from flume_controller.processes import Intent, ProcessRecord, RecordDir
from flume_controller.providers.launch import Child, Launcher

log = structlog.get_logger()

ROLE = "standby"
PAUSE_S = 2.0
"""Between a change and the start of the next standby: first things first."""
STABLE_S = 60.0

Command = Callable[[str, str], Sequence[str]]
"""The command line of a standby: its id, and the socket it listens on."""
Spawn = Callable[[Coroutine[Any, Any, None], str], None]


@dataclass(frozen=True, slots=True)
class Taken:
    """A standby that became a node."""

    id: str
    pid: int
    child: Child | None  # None where an earlier controller started it


class Standbys:
    """`count` of them, or as many as are there yet."""

    def __init__(
        self, count: int, command: Command, launcher: Launcher, records: RecordDir, logs: Path, spawn: Spawn
    ) -> None:
        self._count = count
        self._command = command
        self._launcher = launcher
        self._dir = records
        self._logs = logs
        self._spawn = spawn
        self._records: dict[str, ProcessRecord] = {}
        self._children: dict[str, Child] = {}
        self._changed = asyncio.Event()
        self._backoff = Backoff(first_s=1.0, cap_s=60.0)

    @property
    def ids(self) -> list[str]:
        return list(self._records)

    def adopt(self, record: ProcessRecord) -> None:
        """Take over one that an earlier controller left."""
        if processes.is_alive(record):
            self._follow(record)
        else:
            self._dir.remove(record.id)

    async def take(self, node: str, logfile: Path, begin: Callable[[str], None]) -> Taken | None:
        """Have the oldest one become `node`; None when there is none. `begin` is told its id before.

        One that does not answer is ended. What it logged so far goes into `logfile`. Its own record
        stays for whoever takes it to remove once there is one of the node.
        """
        while self._records:
            id, record = next(iter(self._records.items()))
            del self._records[id]
            began_s = time.monotonic()
            _hand_over_log(Path(record.log), logfile)
            begin(id)
            try:
                pid = await call(self._socket(id), node)
            except StandbyGone as error:
                log.warning("standby_gone", standby=id, pid=record.pid, reason=str(error))
                processes.kill_session(record)
                self._children.pop(id, None)
                self._dir.remove(id)
                continue
            self._changed.set()
            elapsed_ms = round(1e3 * (time.monotonic() - began_s))
            log.info("standby_taken", standby=id, node=node, pid=pid, elapsed_ms=elapsed_ms)
            return Taken(id, pid, self._children.pop(id, None))
        return None

    async def call_again(self, id: str, node: str) -> None:
        """Have that one become `node`, unless it did so already."""
        with suppress(StandbyGone):
            await call(self._socket(id), node)

    async def keep(self) -> NoReturn:
        """Have `count` of them, most of the time."""
        while True:
            self._changed.clear()
            for id in list(self._records)[self._count :]:
                processes.kill_session(self._records[id])
            if len(self._records) >= self._count:
                await self._changed.wait()
            await asyncio.sleep(PAUSE_S)
            if len(self._records) < self._count:
                await self._start()

    async def _start(self) -> None:
        (id,) = free_ids(1, self._records, stem=f"{ROLE}-")
        logfile = self._logs / f"{id}.log"
        logfile.unlink(missing_ok=True)
        began_s = time.monotonic()
        argv = self._command(id, self._socket(id))
        self._dir.begin(Intent(id=id, role=ROLE, argv=tuple(argv), log=str(logfile)))
        try:
            child = await self._launcher.launch(argv, logfile, id)
        except OSError as error:
            self._dir.remove(id)
            log.warning("standby_not_started", reason=str(error))
            await asyncio.sleep(self._backoff.next_s())
            return
        self._children[id] = child
        self._follow(processes.record_of(child.pid, id=id, role=ROLE, log=logfile), began_s)

    def _follow(self, record: ProcessRecord, began_s: float = 0.0) -> None:
        self._records[record.id] = record
        try:
            self._dir.save(record)
        except OSError as error:
            log.warning("record_not_written", node=record.id, reason=str(error))
        self._spawn(self._reap(record, began_s), f"follow {record.id}")

    async def _reap(self, record: ProcessRecord, began_s: float) -> None:
        await processes.wait_ended(record)
        if self._records.get(record.id) is not record:
            return  # a node by now
        processes.kill_session(record)
        child = self._children.pop(record.id, None)
        exit_code = await child.wait() if child else None
        log.warning("standby_ended", standby=record.id, exit_code=exit_code)
        if time.monotonic() - began_s > STABLE_S:
            self._backoff.reset()
        await asyncio.sleep(self._backoff.next_s())
        self._records.pop(record.id, None)
        self._dir.remove(record.id)
        self._changed.set()

    def _socket(self, id: str) -> str:
        return abstract_name(id, self._dir.path)


def _hand_over_log(standby: Path, node: Path) -> None:
    """The file that the process goes on writing gets the node's name, and begins with what was there."""
    try:
        if node.exists():
            said = standby.read_bytes()
            with standby.open("wb") as file:
                file.write(node.read_bytes() + said)
        standby.replace(node)
    except OSError as error:
        log.warning("log_not_handed_over", standby=str(standby), node=str(node), reason=str(error))
