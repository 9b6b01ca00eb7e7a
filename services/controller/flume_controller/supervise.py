"""The processes of a local cluster: kept running, and ended in order.

A process that already runs when it is to be started is taken over as it is: that is how an `up` follows one
that was killed. Nothing that the disk refuses ends the supervision: what could not be written is written
later, and a process that needs room is started again when there is some.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import structlog
from flume_common.etcd_flags import VARIABLES

from flume_controller import log_rotation, own_etcd, processes
from flume_controller.cluster_files import ClusterFiles
from flume_controller.disk_space import DiskSpace, disk_space
from flume_controller.logfiles import last_lines
from flume_controller.processes import ProcessRecord, RecordDir
from flume_controller.supervisor_link import ChildView, SupervisorView

STOP_ORDER = ("router", "weight", "controller", "attention", "standby", "zygote", "etcd")
"""Clients' door first; the controller before the nodes it would otherwise start again, the zygote after
those it reaps; etcd last."""

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0
STABLE_S = 30.0
"""A child that ran this long begins a new series of restarts, and its last end is no trouble any more."""
TEND_S = 2.0
"""Between two looks at logs, and at records that could not be written."""
ROOM_POLL_S = 0.5

log = structlog.get_logger()


class ChildFailed(Exception):
    """A process ended before the cluster was up. The message carries its last lines, and a remedy if any."""

    def __init__(self, node: str, exit_code: int | None, log_file: Path, remedy: str = "") -> None:
        lines = [f"  {node}| {line}" for line in last_lines(log_file)] or [f"  {node}| (it printed nothing)"]
        how = "ended" if exit_code is None else f"exited with {exit_code}"
        head = f"{node} {how} while starting; its last lines:"
        super().__init__("\n".join([head, *lines, *([remedy] if remedy else [])]))
        self.node = node
        self.exit_code = exit_code


@dataclass(slots=True)
class _Child:
    id: str
    role: str
    argv: Sequence[str]
    cwd: Path | None
    record: ProcessRecord
    process: subprocess.Popen[bytes] | None
    """None where another `up` started it."""
    began_s: float  # monotonic; from when on we looked after this process
    deaths: int = 0
    """In a row."""
    restarts: int = 0
    trouble: str = ""
    running: bool = True

    def view(self, now_s: float) -> ChildView:
        settled = self.running and now_s - self.began_s > STABLE_S
        return ChildView(
            id=self.id,
            pid=self.record.pid,
            running=self.running,
            restarts=self.restarts,
            trouble="" if settled else self.trouble,
        )


class Supervisor:
    """Starts children, or takes them over, and restarts those that die."""

    def __init__(self, files: ClusterFiles, tasks: asyncio.TaskGroup, report: Callable[[str], None]) -> None:
        self._files = files
        self._tasks = tasks
        self._report = report
        self._settled = False
        self._keepers: list[asyncio.Task[None]] = [tasks.create_task(self._tend(), name="tend")]
        self._children: dict[str, _Child] = {}

    def start(self, id: str, role: str, argv: Sequence[str], cwd: Path | None = None) -> None:
        """Look after a child from now on: one of this id that runs, or a new one. Raises OSError."""
        found = self._files.records.load(id)
        if found is not None and processes.is_alive(found):
            child = _Child(id, role, argv, cwd, found, None, time.monotonic())
        else:
            record, process = self._spawn(id, role, argv, cwd)
            child = _Child(id, role, argv, cwd, record, process, time.monotonic())
        self._children[id] = child
        self._keepers.append(self._tasks.create_task(self._keep(child), name=f"keep {id}"))

    def settled(self) -> None:
        """The cluster is up: from now on a child that dies is restarted rather than raised."""
        self._settled = True

    def view(self) -> SupervisorView:
        now_s = time.monotonic()
        space = self._space()
        return SupervisorView(
            pid=os.getpid(),
            children=tuple(child.view(now_s) for child in self._children.values()),
            directory=str(self._files.directory),
            free_bytes=space.free_bytes,
            disk_full=space.full,
        )

    def let_go(self) -> None:
        """Stop looking after the children; they run on."""
        for keeper in self._keepers:
            keeper.cancel()

    async def stop_all(self, grace_s: float) -> None:
        """End every process of the cluster in order, also those of the controller."""
        self.let_go()
        self._write_records()
        self._files.remember_nodes()
        await sweep(self._files.records, grace_s)
        for child in self._children.values():
            if processes.is_alive(child.record):  # its record could not be written
                await processes.stop(child.record, grace_s=grace_s)
            if child.process is not None:
                child.process.wait()

    def kill_all(self) -> None:
        """At once and without order."""
        kill_all(self._files.records)
        for child in self._children.values():
            processes.kill_session(child.record)

    async def _keep(self, child: _Child) -> None:
        """Raises ChildFailed before the cluster has settled."""
        while True:
            exit_code = await self._ended(child)
            child.running = False
            lines = self._last_lines(child)
            if not self._settled:
                raise ChildFailed(child.id, exit_code, self._log(child.id), self._remedy(child, lines))
            child.deaths = 0 if time.monotonic() - child.began_s > STABLE_S else child.deaths
            await self._start_again(child, self._end_of(child, exit_code, lines))

    async def _start_again(self, child: _Child, ended: str) -> None:
        """Until it runs, however often that takes."""
        while True:
            pause_s = min(FIRST_PAUSE_S * 2.0 ** min(child.deaths, 10), LONGEST_PAUSE_S)
            child.deaths += 1
            if child.role == own_etcd.ROLE and self._space().full:
                child.trouble = (
                    f"{ended}: no space left on the disk of {self._files.directory}; free some, "
                    "it is started again by itself"
                )
                self._say(child.trouble)
                await self._until_room(LONGEST_PAUSE_S)
            else:
                child.trouble = f"{ended}, starting it again in {pause_s:g} s"
                self._say(child.trouble)
                await asyncio.sleep(pause_s)
            try:
                record, process = self._spawn(child.id, child.role, child.argv, child.cwd)
            except OSError as error:
                ended = f"{child.id} cannot be started ({error.strerror or error})"
                continue
            child.record, child.process, child.began_s = record, process, time.monotonic()
            child.trouble, child.running = f"{ended}; it runs again", True
            child.restarts += 1
            return

    def _spawn(
        self, id: str, role: str, argv: Sequence[str], cwd: Path | None
    ) -> tuple[ProcessRecord, subprocess.Popen[bytes]]:
        """Raises OSError."""
        process = processes.spawn(argv, self._log(id), env=_environment(), cwd=cwd)
        record = processes.record_of(process.pid, id=id, role=role, log=self._log(id))
        try:
            self._files.records.save(record)
        except OSError as error:
            log.warning("record_not_written", node=id, reason=str(error))  # _tend tries again
        return record, process

    async def _ended(self, child: _Child) -> int | None:
        """Its exit code, None where another `up` started it."""
        await processes.wait_ended(child.record)
        processes.kill_session(child.record)
        return child.process.wait() if child.process is not None else None

    async def _tend(self) -> NoReturn:
        """Keep logs within bounds, and write the records that could not be written."""
        while True:
            await asyncio.sleep(TEND_S)
            with suppress(OSError):
                logs = [*self._files.logs.glob("*.log"), self._files.output]
                await asyncio.to_thread(log_rotation.rotate_large, logs)
            self._write_records()

    def _write_records(self) -> None:
        for child in self._children.values():
            with suppress(OSError):
                if child.running and self._files.records.load(child.id) != child.record:
                    self._files.records.save(child.record)

    async def _until_room(self, longest_s: float) -> None:
        ends_s = time.monotonic() + longest_s
        while self._space().full and time.monotonic() < ends_s:  # noqa: ASYNC110  (a disk has no event)
            await asyncio.sleep(ROOM_POLL_S)

    def _space(self) -> DiskSpace:
        try:
            return disk_space(self._files.directory)
        except OSError:  # the directory is gone: nothing that more room would mend
            return DiskSpace(1 << 62, 1)

    def _last_lines(self, child: _Child) -> list[str]:
        with suppress(OSError):
            return last_lines(self._log(child.id))
        return []

    def _end_of(self, child: _Child, exit_code: int | None, lines: Sequence[str]) -> str:
        how = "ended" if exit_code is None else f"exited with {exit_code}"
        if own_etcd.ran_out_of_space(lines):
            return f"{child.id} {how}, its disk being full"
        at_once = time.monotonic() - child.began_s < STABLE_S  # else its log may speak of an earlier one
        remedy = self._remedy(child, lines) if at_once else ""
        return f"{child.id} {how} ({remedy})" if remedy else f"{child.id} {how}"

    def _remedy(self, child: _Child, lines: Sequence[str]) -> str:
        return own_etcd.remedy(self._files, lines) if child.role == own_etcd.ROLE else ""

    def _say(self, line: str) -> None:
        with suppress(OSError):  # its output may be on the disk that is full
            self._report(line)

    def _log(self, id: str) -> Path:
        return self._files.logs / f"{id}.log"


def _environment() -> dict[str, str]:
    """Ours; but how to reach etcd is said on command lines, and must not be said twice."""
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return inherited | {"PYTHONUNBUFFERED": "1"}


async def sweep(records: RecordDir, grace_s: float) -> list[str]:
    """End every recorded process in order and drop the records; the ids of those that ran."""
    ended = []
    for role in STOP_ORDER:
        # Read anew for each role: the controller may have started a node meanwhile.
        ours = [record for record in records.all() if record.role == role]
        ended += [record.id for record in ours if processes.is_alive(record)]
        await asyncio.gather(*(processes.stop(record, grace_s=grace_s) for record in ours))
        for record in ours:
            records.remove(record.id)
    return ended


def kill_all(records: RecordDir) -> None:
    """SIGKILL every recorded process, controller and the like first."""
    for role in STOP_ORDER:
        for record in records.all():
            if record.role == role:
                processes.kill_session(record)
