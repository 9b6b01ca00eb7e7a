"""The child processes of a local cluster: kept running, and ended in order."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog
from flume_common.etcd_flags import VARIABLES

from flume_controller import processes
from flume_controller.cluster_files import ClusterFiles
from flume_controller.logfiles import last_lines
from flume_controller.processes import RecordDir

STOP_ORDER = ("router", "weight", "controller", "attention", "standby", "zygote", "etcd")
"""Clients' door first; the controller before the nodes it would otherwise start again, the zygote after
those it reaps; etcd last."""

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0
STABLE_S = 30.0
"""A child that ran this long begins a new series of restarts."""

log = structlog.get_logger()


class ChildFailed(Exception):
    """A process ended before the cluster was up. The message carries its last lines."""

    def __init__(self, node: str, exit_code: int | None, log_file: Path) -> None:
        lines = [f"  {node}| {line}" for line in last_lines(log_file)] or [f"  {node}| (it printed nothing)"]
        how = "ended" if exit_code is None else f"exited with {exit_code}"
        super().__init__("\n".join([f"{node} {how} while starting; its last lines:", *lines]))
        self.node = node
        self.exit_code = exit_code


class Supervisor:
    """Starts children and restarts those that die."""

    def __init__(self, files: ClusterFiles, tasks: asyncio.TaskGroup, report: Callable[[str], None]) -> None:
        self._files = files
        self._tasks = tasks
        self._report = report
        self._settled = False
        self._keepers: list[asyncio.Task[None]] = []
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, id: str, role: str, argv: Sequence[str]) -> None:
        """Run a child from now on. Raises OSError when it cannot be started."""
        self._spawn(id, role, argv)
        keeper = self._tasks.create_task(self._keep(id, role, argv), name=f"keep {id}")
        self._keepers.append(keeper)

    def settled(self) -> None:
        """The cluster is up: from now on a child that dies is restarted rather than raised."""
        self._settled = True

    async def stop_all(self, grace_s: float) -> None:
        """End every process of the cluster in order, also those of the controller."""
        for keeper in self._keepers:
            keeper.cancel()
        await sweep(self._files.records, grace_s)
        for child in self._children.values():
            child.wait()

    def kill_all(self) -> None:
        """At once and without order."""
        kill_all(self._files.records)

    async def _keep(self, id: str, role: str, argv: Sequence[str]) -> None:
        """Raises ChildFailed before the cluster has settled."""
        deaths = 0
        while True:
            began_s = time.monotonic()
            exit_code = await self._ended(id)
            if not self._settled:
                raise ChildFailed(id, exit_code, self._log(id))
            deaths = 0 if time.monotonic() - began_s > STABLE_S else deaths
            pause_s = min(FIRST_PAUSE_S * 2.0 ** min(deaths, 10), LONGEST_PAUSE_S)
            self._report(f"{id} exited with {exit_code}, starting it again in {pause_s:g} s")
            deaths += 1
            await asyncio.sleep(pause_s)
            self._spawn(id, role, argv)

    def _spawn(self, id: str, role: str, argv: Sequence[str]) -> None:
        child = processes.spawn(argv, self._log(id), env=_environment())
        self._children[id] = child
        self._files.records.save(processes.record_of(child.pid, id=id, role=role, log=self._log(id)))

    async def _ended(self, id: str) -> int:
        record = self._files.records.load(id)
        if record is not None:
            await processes.wait_ended(record)
            processes.kill_session(record)
        return self._children[id].wait()

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
