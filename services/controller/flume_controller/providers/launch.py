"""Starting a node's process: forked from the zygote where that can be, run anew where not."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import structlog
from flume_common.zygote import ZygoteUnavailable

from flume_controller import processes
from flume_controller.providers.zygote import Zygote

log = structlog.get_logger()


class Child(Protocol):
    """A process that we started."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> int | None:
        """Its exit code; asked for only once it has ended."""


class ExecutedChild:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int | None:
        return self._process.wait()


class Launcher:
    def __init__(self, zygote: Zygote | None) -> None:
        self._zygote = zygote

    async def launch(self, argv: Sequence[str], logfile: Path, node: str) -> Child:
        """Raises OSError when there is no such program."""
        began_s = time.monotonic()
        child, how = await self._launch(argv, logfile)
        elapsed_ms = round(1e3 * (time.monotonic() - began_s))
        log.info("process_started", node=node, pid=child.pid, how=how, elapsed_ms=elapsed_ms)
        return child

    async def _launch(self, argv: Sequence[str], logfile: Path) -> tuple[Child, str]:
        if self._zygote is not None and self._zygote.runs(argv):
            try:
                return await self._zygote.fork(argv, logfile), "forked"
            except ZygoteUnavailable as error:
                log.warning("zygote_unavailable", reason=str(error))
        return ExecutedChild(processes.spawn(argv, logfile)), "executed"
