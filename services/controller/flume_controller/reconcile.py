"""The loop around a reconcile pass: takes keys from the work queue, and decides what follows a pass.

    result                       then
    an error                     again after the limiter's delay
    TerminalError                not again until something changes; counted
    Result(requeue_after_s)      forgotten, and again then
    Result()                     forgotten

A key says what to look at and nothing about what happened: a pass observes the world afresh. Counters
carry the names of controller-runtime's metrics.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import structlog
from flume_common.tasks import background
from structlog.contextvars import bound_contextvars

from flume_controller.workqueue import Clock, Durations, WorkQueue

log = structlog.get_logger()

RESULTS = ("success", "error", "requeue", "requeue_after")


BOUNDS_S = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    *(1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 15.0, 20.0, 25.0, 30.0),
    *(40.0, 50.0, 60.0),
)
"""Of controller-runtime's histogram of passes."""


class TerminalError(Exception):
    """Trying again does not help until somebody changes something."""


@dataclass(frozen=True, slots=True)
class Result:
    """A pass that went well."""

    requeue_after_s: float | None = None
    """Run again then even if nothing happens: it waits for something that nobody announces."""


Reconcile = Callable[[str], Awaitable[Result]]
Errors = tuple[type[Exception], ...]


class Reconciler:
    """One worker: passes never overlap."""

    max_concurrent_reconciles = 1

    def __init__(
        self,
        reconcile: Reconcile,
        keys: Sequence[str],
        *,
        expected: Errors = (),
        stop_on: Errors = (),
        resync_s: float = 10.0,
        timeout_s: float = 60.0,
        queue: WorkQueue[str] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """`expected` errors are the world's, all others ours (counted as panics); `stop_on` ends `run`."""
        self.reconcile_total = Counter(dict.fromkeys(RESULTS, 0))
        self.reconcile_errors_total = 0
        self.terminal_reconcile_errors_total = 0
        self.reconcile_panics_total = 0
        self.reconcile_timeouts_total = 0
        self.reconcile_time_seconds = Durations(BOUNDS_S)
        self.active_workers = 0
        self.queue = queue or WorkQueue[str]()
        self._reconcile = reconcile
        self._keys = tuple(keys)
        self._expected = expected
        self._stop_on = stop_on
        self._resync_s = resync_s
        self._timeout_s = timeout_s
        self._clock = clock
        self._ids = itertools.count(1)

    def poke(self) -> None:
        """Something may have changed."""
        for key in self._keys:
            self.queue.add(key)

    async def run(self) -> NoReturn:
        """Works until cancelled. Raises what `stop_on` names."""
        async with background(reconcile_worker=self._work(), reconcile_resync=self._resync()):
            await asyncio.get_running_loop().create_future()
        raise AssertionError("the future above never completes")

    async def run_once(self, key: str) -> None:
        """One pass over `key`, and what follows from it."""
        began_s = self._clock()
        self.active_workers += 1
        try:
            with bound_contextvars(pass_id=next(self._ids)):
                await self._pass(key)
        finally:
            self.active_workers -= 1
            self.reconcile_time_seconds.add(self._clock() - began_s)

    async def _work(self) -> NoReturn:
        while True:
            key = await self.queue.get()
            try:
                await self.run_once(key)
            finally:
                self.queue.done(key)

    async def _resync(self) -> NoReturn:
        """Whatever was or was not heard."""
        while True:
            self.poke()
            await asyncio.sleep(self._resync_s)

    async def _pass(self, key: str) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await self._reconcile(key)
        except self._stop_on:
            raise
        except TerminalError as error:
            self._count("error")
            self.reconcile_errors_total += 1
            self.terminal_reconcile_errors_total += 1
            self.queue.forget(key)
            log.error("reconcile_failed_for_good", key=key, error=str(error))
        except Exception as error:
            self._failed(key, error)
        else:
            self._succeeded(key, result)

    def _failed(self, key: str, error: Exception) -> None:
        self._count("error")
        self.reconcile_errors_total += 1
        self.reconcile_timeouts_total += isinstance(error, TimeoutError)
        unexpected = not isinstance(error, (*self._expected, TimeoutError))
        self.reconcile_panics_total += unexpected
        retry_s = self.queue.add_rate_limited(key)
        log.warning(
            "reconcile_failed",
            key=key,
            error=f"{type(error).__name__}: {error}",
            failures=self.queue.requeues(key),
            retry_s=retry_s,
            exc_info=unexpected,
        )

    def _succeeded(self, key: str, result: Result) -> None:
        self.queue.forget(key)
        if result.requeue_after_s is None:
            self._count("success")
        else:
            self._count("requeue_after")
            self.queue.add_after(key, result.requeue_after_s)

    def _count(self, result: str) -> None:
        self.reconcile_total[result] += 1
