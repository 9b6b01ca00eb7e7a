"""The loop around a reconcile pass: when to run it, and what to do when it fails.

A pass observes the world afresh, so pokes carry no facts and may coalesce.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

import structlog

log = structlog.get_logger()

Pass = Callable[[], Awaitable[float | None]]
"""Returns the seconds after which it wants to run again even if nothing happens, None for no wish."""


class Reconciler:
    """Runs a pass when poked, after at most `resync_s` anyway, and again after a failure."""

    def __init__(
        self, reconcile: Pass, *, resync_s: float = 10.0, backoff_s: float = 0.2, backoff_cap_s: float = 10.0
    ) -> None:
        self._reconcile = reconcile
        self._resync_s = resync_s
        self._backoff_s = backoff_s
        self._backoff_cap_s = backoff_cap_s
        self._poked = asyncio.Event()
        self._failures = 0

    def poke(self) -> None:
        self._poked.set()

    async def run(self) -> NoReturn:
        while True:
            # Cleared before the pass observes: a poke during the pass starts another one.
            self._poked.clear()
            await self._sleep_until_poked(await self.run_once())

    async def run_once(self) -> float:
        """One pass. Returns the seconds until the next one falls due."""
        try:
            wish_s = await self._reconcile()
        except Exception as error:
            self._failures += 1
            retry_s = min(self._backoff_s * 2.0 ** min(self._failures - 1, 30), self._backoff_cap_s)
            log.warning(
                "reconcile_failed",
                error=f"{type(error).__name__}: {error}",
                failures=self._failures,
                retry_s=retry_s,
            )
            return retry_s
        self._failures = 0
        return self._resync_s if wish_s is None else min(wish_s, self._resync_s)

    async def _sleep_until_poked(self, delay_s: float) -> None:
        try:
            async with asyncio.timeout(delay_s):
                await self._poked.wait()
        except TimeoutError:
            pass
