"""Attention nodes as processes of this machine.

They run in process groups of their own and are recorded in files: a controller that ends leaves them
alone, and the next one adopts them. A node is a standby that was waiting, or a fork of the zygote, or a
new interpreter, whichever is there, in that order.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import structlog
from flume_common.tasks import background

from flume_controller import processes
from flume_controller.processes import Intent, ProcessRecord, RecordDir
from flume_controller.providers import standby
from flume_controller.providers.base import Instance
from flume_controller.providers.launch import Child, Launcher
from flume_controller.providers.standby import Standbys
from flume_controller.providers.zygote import Zygote

log = structlog.get_logger()

ROLE = "attention"
RECORDS = "run"

Command = Callable[[str], Sequence[str]]
"""The command line that runs the node of a given id."""


class LocalProvider:
    """See `providers.base.Provider`."""

    def __init__(
        self,
        command: Command,
        records: RecordDir,
        logs: Path,
        tasks: asyncio.TaskGroup,
        *,
        grace_s: float,
        zygote: Zygote | None,
        num_standbys: int,
        standby_command: standby.Command,
    ) -> None:
        self._command = command
        self._dir = records
        self._logs = logs
        self._tasks = tasks
        self._grace_s = grace_s
        self._records: dict[str, ProcessRecord] = {}
        self._children: dict[str, Child] = {}
        self._zygote = zygote
        self._launcher = Launcher(zygote)
        self._standbys = Standbys(num_standbys, standby_command, self._launcher, records, logs, self._spawn)
        self._changed = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()

    def adopt(self) -> None:
        """Take over what an earlier controller left, running or ended meanwhile."""
        self._finish_starts()
        records = self._dir.all()
        nodes = {record.pid for record in records if record.role == ROLE and processes.is_alive(record)}
        for record in records:
            if record.role == standby.ROLE and record.pid in nodes:
                self._dir.remove(record.id)  # it became that node
            elif record.role == standby.ROLE:
                self._standbys.adopt(record)
            if record.role == ROLE:
                log.info("node_adopted", node=record.id, pid=record.pid, running=processes.is_alive(record))
                self._follow(record)
                if record.stopping_at_s is not None:
                    self._spawn(self._end(record), f"stop {record.id}")

    def _finish_starts(self) -> None:
        """Write the records that an earlier controller died before writing."""
        for intent in self._dir.begun():
            record = self._begun(intent)
            if record is None:
                self._dir.remove(intent.id)
                continue
            log.warning("start_finished", node=intent.id, pid=record.pid, standby=intent.standby or None)
            self._dir.save(record)

    def _begun(self, intent: Intent) -> ProcessRecord | None:
        if (found := self._dir.load(intent.id)) is not None:
            return found  # only the mark of its beginning was left
        waiting = self._dir.load(intent.standby) if intent.standby else None
        if waiting is not None and processes.is_alive(waiting):
            # It may have been called, or not yet: then it is now.
            self._spawn(self._standbys.call_again(waiting.id, intent.id), f"call {intent.id}")
            pid: int | None = waiting.pid
        else:
            pid = processes.find(intent.argv, [record.pid for record in self._dir.all()])
        if pid is None:
            return None
        try:
            return processes.record_of(pid, id=intent.id, role=intent.role, log=intent.log)
        except ProcessLookupError:
            return None

    async def keep_ready(self) -> NoReturn:
        """Keep what makes starts fast, zygote and standbys; only for whoever may start nodes at all."""
        async with background(standbys=self._standbys.keep()):
            if self._zygote is not None:
                await self._zygote.keep()
            await asyncio.get_running_loop().create_future()
        raise AssertionError("the future above never completes")

    def let_go(self) -> None:
        """Stop looking after the nodes; they run on."""
        for task in self._running:
            task.cancel()

    async def instances(self) -> Sequence[Instance]:
        return [_instance(record) for record in self._records.values()]

    async def start(self, node: str) -> None:
        if node in self._records:
            return
        logfile = self._logs / f"{node}.log"
        began_s = time.monotonic()
        intent = Intent(id=node, role=ROLE, argv=tuple(self._command(node)), log=str(logfile))
        taken = await self._standbys.take(
            node, logfile, lambda id: self._dir.begin(msgspec.structs.replace(intent, standby=id))
        )
        if taken is not None:
            self._take_on(node, taken.pid, taken.child, logfile)
            self._dir.remove(taken.id)
        else:
            child = await self._launch(intent, logfile)
            self._take_on(node, child.pid, child, logfile)
        elapsed_ms = round(1e3 * (time.monotonic() - began_s))
        pid = self._records[node].pid
        log.info("node_started", node=node, pid=pid, standby=taken is not None, elapsed_ms=elapsed_ms)

    async def _launch(self, intent: Intent, logfile: Path) -> Child:
        self._dir.begin(intent)
        try:
            return await self._launcher.launch(intent.argv, logfile, intent.id)
        except OSError:
            self._dir.remove(intent.id)
            raise

    async def stop(self, node: str) -> None:
        record = self._records.get(node)
        if record is None or record.ended or record.stopping_at_s is not None:
            return
        record = self._save(msgspec.structs.replace(record, stopping_at_s=time.time()))
        log.info("node_stopping", node=node, pid=record.pid, grace_s=self._grace_s)
        self._spawn(self._end(record), f"stop {node}")

    async def forget(self, node: str) -> None:
        record = self._records.get(node)
        if record is not None and record.ended:
            del self._records[node]
            self._dir.remove(node)

    async def changed(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def _take_on(self, node: str, pid: int, child: Child | None, logfile: Path) -> None:
        if child is not None:
            self._children[node] = child
        self._follow(processes.record_of(pid, id=node, role=ROLE, log=logfile))

    def _follow(self, record: ProcessRecord) -> None:
        self._save(record)
        if not record.ended:
            self._spawn(self._reap(record), f"follow {record.id}")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = self._tasks.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def _save(self, record: ProcessRecord) -> ProcessRecord:
        """A disk that is full costs the next controller its knowledge of a node, and us nothing."""
        self._records[record.id] = record
        try:
            self._dir.save(record)
        except OSError as error:
            log.warning("record_not_written", node=record.id, reason=str(error))
        return record

    async def _end(self, record: ProcessRecord) -> None:
        await processes.stop(record, grace_s=self._grace_s)

    async def _reap(self, record: ProcessRecord) -> None:
        await processes.wait_ended(record)
        # Before it is reaped its pid is surely still its own, and so is the process group.
        processes.kill_session(record)
        child = self._children.pop(record.id, None)
        exit_code = await child.wait() if child is not None else None
        record = self._save(
            msgspec.structs.replace(self._records[record.id], ended=True, exit_code=exit_code)
        )
        log.info("node_ended", node=record.id, exit_code=exit_code, asked=record.stopping_at_s is not None)
        self._changed.set()


def recorded(records: RecordDir) -> list[Instance]:
    """The nodes that whoever runs them has written down, as they are now."""
    ours = [record for record in records.all() if record.role == ROLE]
    return [
        _instance(msgspec.structs.replace(record, ended=record.ended or not processes.is_alive(record)))
        for record in ours
    ]


def _instance(record: ProcessRecord) -> Instance:
    return Instance(
        id=record.id,
        pid=record.pid,
        started_at_s=record.started_at_s,
        running=not record.ended,
        stopping=record.stopping_at_s is not None,
        exit_code=record.exit_code,
        log=record.log,
    )


@asynccontextmanager
async def local_provider(
    command: Command,
    directory: Path,
    *,
    grace_s: float = 10.0,
    zygote: bool = False,
    device: str = "cpu",
    num_standbys: int = 0,
    standby_command: standby.Command | None = None,
) -> AsyncIterator[LocalProvider]:
    """Records go to `directory`/run, output to `directory`/logs. Nodes go on running when the body ends.

    With `zygote` nodes are forked where that is possible, ready for `device`. `standby_command` by default
    runs what `command` does, with --standby.
    """
    records, logs = RecordDir(directory / RECORDS), directory / "logs"
    async with asyncio.TaskGroup() as tasks:
        provider = LocalProvider(
            command,
            records,
            logs,
            tasks,
            grace_s=grace_s,
            zygote=Zygote(records, logs, device) if zygote else None,
            num_standbys=num_standbys,
            standby_command=standby_command or (lambda id, socket: (*command(id), "--standby", socket)),
        )
        provider.adopt()
        try:
            yield provider
        finally:
            provider.let_go()
