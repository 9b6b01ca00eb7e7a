"""Attention nodes as processes of this machine.

They run in sessions of their own and are recorded in files: a controller that ends leaves them alone,
and the next one adopts them.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import structlog

from flume_controller import processes
from flume_controller.processes import ProcessRecord, RecordDir
from flume_controller.providers.base import Instance

log = structlog.get_logger()

ROLE = "attention"

Command = Callable[[str], Sequence[str]]
"""The command line that runs the node of a given id."""


class LocalProvider:
    """See `providers.base.Provider`."""

    def __init__(
        self, command: Command, records: RecordDir, logs: Path, tasks: asyncio.TaskGroup, *, grace_s: float
    ) -> None:
        self._command = command
        self._dir = records
        self._logs = logs
        self._tasks = tasks
        self._grace_s = grace_s
        self._records: dict[str, ProcessRecord] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._changed = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()

    def adopt(self) -> None:
        """Take over what an earlier controller left, running or ended meanwhile."""
        for record in self._dir.all():
            if record.role == ROLE:
                log.info("node_adopted", node=record.id, pid=record.pid, running=processes.is_alive(record))
                self._follow(record)
                if record.stopping_at_s is not None:
                    self._spawn(self._end(record), f"stop {record.id}")

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
        child = processes.spawn(self._command(node), logfile)
        self._children[node] = child
        self._follow(processes.record_of(child.pid, id=node, role=ROLE, log=logfile))
        log.info("node_started", node=node, pid=child.pid)

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

    def _follow(self, record: ProcessRecord) -> None:
        self._save(record)
        if not record.ended:
            self._spawn(self._reap(record), f"follow {record.id}")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = self._tasks.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def _save(self, record: ProcessRecord) -> ProcessRecord:
        self._records[record.id] = record
        self._dir.save(record)
        return record

    async def _end(self, record: ProcessRecord) -> None:
        await processes.stop(record, grace_s=self._grace_s)

    async def _reap(self, record: ProcessRecord) -> None:
        await processes.wait_ended(record)
        # Before it is reaped its pid is surely still its own, and so is the process group.
        processes.kill_session(record)
        child = self._children.pop(record.id, None)
        exit_code = child.wait() if child is not None else None
        record = self._save(
            msgspec.structs.replace(self._records[record.id], ended=True, exit_code=exit_code)
        )
        log.info("node_ended", node=record.id, exit_code=exit_code, asked=record.stopping_at_s is not None)
        self._changed.set()


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
    command: Command, directory: Path, *, grace_s: float = 10.0
) -> AsyncIterator[LocalProvider]:
    """Records go to `directory`/run, output to `directory`/logs. Nodes go on running when the body ends."""
    async with asyncio.TaskGroup() as tasks:
        provider = LocalProvider(
            command, RecordDir(directory / "run"), directory / "logs", tasks, grace_s=grace_s
        )
        provider.adopt()
        try:
            yield provider
        finally:
            provider.let_go()
