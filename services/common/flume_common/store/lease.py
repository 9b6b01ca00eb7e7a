"""A lease held for as long as a block runs, renewed in the background."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import NoReturn

import structlog

from flume_common.backoff import Backoff
from flume_common.store.client import LeaseGrant, Store
from flume_common.store.errors import LeaseLost, StoreError
from flume_common.tasks import background

log = structlog.get_logger(__name__)

RENEWALS_PER_TTL = 3
"""Renewed at a third of the TTL: two renewals may fail, or the loop block as long, without harm."""

REVOKE_S = 2.0


class HeldLease:
    """A lease, and what we know of its time."""

    def __init__(self, grant: LeaseGrant, granted_at_s: float) -> None:
        self.id = grant.id
        self.ttl_s = grant.ttl_s
        self._renewed_at_s = granted_at_s

    @property
    def remaining_s(self) -> float:
        """Seconds for which the lease surely lives, by our own monotonic clock.

        Below 0 it may still live: only etcd decides, and a new leader starts its time anew.
        """
        return self._renewed_at_s + self.ttl_s - time.monotonic()

    async def renew_forever(self, store: Store) -> NoReturn:
        """Raises LeaseLost when etcd says so; an etcd that does not answer is asked again."""
        backoff = Backoff(cap_s=self.ttl_s / RENEWALS_PER_TTL)
        pause_s = self.ttl_s / RENEWALS_PER_TTL
        while True:
            await asyncio.sleep(pause_s)
            # Before the call, so that the time it takes is counted against us.
            asked_at_s = time.monotonic()
            try:
                self.ttl_s = await store.keep_alive(self.id, timeout_s=self.ttl_s / 4)
            except LeaseLost:
                raise
            except StoreError as error:
                log.warning("lease_not_renewed", lease=f"{self.id:x}", remaining_s=round(self.remaining_s, 1),
                            detail=str(error))  # fmt: skip
                pause_s = backoff.next_s()
            else:
                self._renewed_at_s = asked_at_s
                backoff.reset()
                pause_s = self.ttl_s / RENEWALS_PER_TTL


@asynccontextmanager
async def hold_lease(store: Store, ttl_s: float) -> AsyncIterator[HeldLease]:
    """Grant a lease, renew it while the body runs, revoke it at the end.

    A lost lease cancels the body and raises LeaseLost, so hold one around work that must end with
    it and around nothing else. Raises StoreUnavailable or StoreRefused when none is granted.
    """
    asked_at_s = time.monotonic()
    lease = HeldLease(await store.grant(ttl_s), asked_at_s)
    lost = False
    try:
        async with background(lease_keeper=lease.renew_forever(store)):
            yield lease
    except LeaseLost as error:
        lost = error.lease == lease.id
        store.lease_losses += lost
        raise
    except BaseExceptionGroup as errors:
        # Whoever was stopped for long and wakes up may hear it twice: by a write and by the renewal.
        if errors.split(LeaseLost)[1] is not None:
            raise
        lost = True
        store.lease_losses += 1
        raise LeaseLost(lease.id) from None
    finally:
        if not lost:
            # It runs out by itself: not worth holding up the end for an etcd that is away.
            with suppress(StoreError):
                await store.revoke(lease.id, timeout_s=min(lease.ttl_s, REVOKE_S))
