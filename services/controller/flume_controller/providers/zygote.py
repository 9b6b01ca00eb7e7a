"""The zygote of this machine's attention nodes: kept running, and asked for supervisors.

It outlives the controller, as the nodes do, and the next one goes on with it. See `flume_common.zygote`.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import structlog
from flume_common.backoff import Backoff
from flume_common.zygote import (
    ENGINE_ZYGOTE,
    Fork,
    ForkedProcess,
    ZygoteUnavailable,
    abstract_name,
    bind,
    fork,
)

from flume_controller import processes
from flume_controller.processes import ProcessRecord, RecordDir

log = structlog.get_logger()

ROLE = "zygote"
ID = "zygote"
_ATTENTION = (sys.executable, "-m", "flume_attention")
_LONGEST_PAUSE_S = 30.0
_STABLE_S = 60.0


class Zygote:
    """At most one runs per directory of records. `device` is what the nodes' engines run on."""

    def __init__(self, records: RecordDir, logs: Path, device: str = "cpu") -> None:
        self._records = records
        self._device = device
        self._log = logs / f"{ID}.log"
        self._supervisors = abstract_name("supervisors", records.path)
        self._engines = abstract_name("engines", records.path)
        self._backoff = Backoff(first_s=1.0, cap_s=_LONGEST_PAUSE_S)
        self._not_before_s = 0.0
        self._started_s = 0.0
        self._child: subprocess.Popen[bytes] | None = None

    def runs(self, argv: Sequence[str]) -> bool:
        """Whether it has imported what this command line runs."""
        return tuple(argv[: len(_ATTENTION)]) == _ATTENTION

    async def fork(self, argv: Sequence[str], logfile: Path) -> ForkedProcess:
        """A supervisor, in a process group of its own. Raises ZygoteUnavailable."""
        self.ensure()
        request = Fork(
            module="flume_attention.__main__",
            args=list(argv[len(_ATTENTION) :]),
            env={**os.environ, ENGINE_ZYGOTE: self._engines},
        )
        with processes.open_log(logfile) as output:
            return await fork(self._supervisors, request, (output.fileno(), output.fileno()))

    def ensure(self) -> ProcessRecord | None:
        """Start one unless one runs or the last one ended just now; the record of the one that runs."""
        record = self._records.load(ID)
        if record is not None and processes.is_alive(record):
            return record
        if time.monotonic() < self._not_before_s:
            return None
        self._note_attempt()
        try:
            return self._spawn()
        except OSError as error:  # the names are taken while the last one's second half is still ending
            log.warning("zygote_not_started", reason=str(error))
            return None

    async def keep(self) -> NoReturn:
        """Have one at all times."""
        while True:
            record = self.ensure()
            if record is None:
                await asyncio.sleep(max(self._not_before_s - time.monotonic(), 0.05))
                continue
            await processes.wait_ended(record)
            exit_code = self._child.wait() if self._child and self._child.pid == record.pid else None
            log.warning("zygote_ended", pid=record.pid, exit_code=exit_code)

    def _spawn(self) -> ProcessRecord:
        # Bound here, so that requests made from now on wait in the sockets until all is imported.
        with bind(self._supervisors) as supervisors, bind(self._engines) as engines:
            fds = (supervisors.fileno(), engines.fileno())
            argv = [
                *(sys.executable, "-m", "flume_attention.zygote"),
                *("--supervisors-fd", str(fds[0]), "--engines-fd", str(fds[1]), "--preload", self._device),
            ]
            if self._child is not None:
                self._child.poll()  # reaped
            self._child = processes.spawn(argv, self._log, pass_fds=fds)
        record = processes.record_of(self._child.pid, id=ID, role=ROLE, log=self._log)
        try:
            self._records.save(record)
        except OSError:
            processes.kill_session(record)  # or nobody would ever end it
            raise
        log.info("zygote_started", pid=record.pid)
        return record

    def _note_attempt(self) -> None:
        now_s = time.monotonic()
        if now_s - self._started_s > _STABLE_S:
            self._backoff.reset()
        self._started_s = now_s
        self._not_before_s = now_s + self._backoff.next_s()


__all__ = ["ROLE", "Zygote", "ZygoteUnavailable"]
