"""Who leads: an election over etcd, and writes that only the leader can make.

Each candidate holds a lease and a key under it; the oldest key (smallest create revision) leads, and
whoever is next waits for those before it to go. Like client-go's leader election in its timing: a holder
that could not renew for `renew_deadline_s`, by its own monotonic clock, stops at once, well before its
lease runs out and another one may begin. It then stands again as the last in line; the process goes on.

None of that keeps two processes from believing at the same moment that they lead (one may have been
stopped and woken). So what they write goes through `Fenced`: every transaction also compares the create
revision of the writer's election key, which is its fencing token, and etcd refuses those of the past.

* ElectionError
  + Deposed        this term is over: what was attempted in its name was refused
  + NotRenewed     the lease could not be renewed in time
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NoReturn

import msgspec
import structlog

from flume_common.backoff import Backoff
from flume_common.store import (
    Compare,
    Get,
    KeyValue,
    LeaseLost,
    Op,
    Put,
    Store,
    StoreError,
    TxnResult,
    View,
    absent,
    create_revision,
    live,
)
from flume_common.tasks import background

log = structlog.get_logger(__name__)

JITTER = 1.2
"""client-go spreads its retries by up to this factor; the constraint between the timings counts with it."""
RESIGN_S = 2.0
"""How long giving up the lease may hold up the end of a candidate."""


class ElectionError(Exception):
    """Base of what ends a term."""


class Deposed(ElectionError):
    def __init__(self, epoch: int) -> None:
        super().__init__(f"the term with epoch {epoch} is over")
        self.epoch = epoch


class NotRenewed(ElectionError):
    def __init__(self, deadline_s: float) -> None:
        super().__init__(f"the lease was not renewed for {deadline_s:g} s")
        self.deadline_s = deadline_s


@dataclass(frozen=True, slots=True)
class Timing:
    """Raises ValueError unless lease > renew deadline > 1.2 x retry > 0."""

    lease_s: float = 15.0
    """How long the others wait for a leader that died without saying so."""
    renew_deadline_s: float = 10.0
    """A leader that could not renew for so long stops; the rest of the lease is its margin."""
    retry_s: float = 2.0
    """Between two renewals."""

    def __post_init__(self) -> None:
        if self.retry_s <= 0:
            raise ValueError(f"the retry period must be above 0, got {self.retry_s:g} s")
        if self.renew_deadline_s <= JITTER * self.retry_s:
            raise ValueError(
                f"the renew deadline ({self.renew_deadline_s:g} s) must be longer than {JITTER} times "
                f"the retry period ({self.retry_s:g} s)"
            )
        if self.lease_s <= self.renew_deadline_s:
            raise ValueError(
                f"the lease duration ({self.lease_s:g} s) must be longer than the renew deadline "
                f"({self.renew_deadline_s:g} s)"
            )


class Candidacy(msgspec.Struct, frozen=True, kw_only=True):
    """Who stands; the JSON value of an election key."""

    id: str
    started_at_s: float  # Unix time at which the process began to stand

    @classmethod
    def of(cls, kv: KeyValue) -> Candidacy | None:
        """None when the value is none."""
        try:
            return msgspec.json.decode(kv.value, type=cls)
        except msgspec.DecodeError:
            return None


class Place(Enum):
    """Where a candidate is."""

    UNSEEN = auto()  # its own key has not come by yet
    WAITING = auto()
    FIRST = auto()
    GONE = auto()


def place(candidates: Mapping[str, KeyValue], revision: int, key: str, epoch: int) -> Place:
    """The place of the candidate whose key was created at `epoch`, as seen at `revision`. Pure.

    A key older than ours cannot appear once we have seen our own, and one that is gone stays gone: FIRST
    may be learned late, but it is never wrong while our key lives.
    """
    if revision < epoch:
        return Place.UNSEEN
    own = candidates.get(key)
    if own is None or own.create_revision != epoch:
        return Place.GONE
    return Place.FIRST if _oldest(candidates.values()) is own else Place.WAITING


def _oldest(candidates: Iterable[KeyValue]) -> KeyValue | None:
    return min(candidates, key=lambda kv: kv.create_revision, default=None)


class _Renewal:
    """One lease and when it was last renewed, by our own clock."""

    def __init__(self, store: Store, lease: int, timing: Timing, granted_at_s: float) -> None:
        self._store = store
        self._lease = lease
        self._timing = timing
        self._renewed_at_s = granted_at_s

    @property
    def left_s(self) -> float:
        """Until we have to stop."""
        return self._renewed_at_s + self._timing.renew_deadline_s - time.monotonic()

    async def forever(self) -> NoReturn:
        """Raises NotRenewed, or LeaseLost when etcd says so."""
        while True:
            await asyncio.sleep(min(self._timing.retry_s, max(self.left_s, 0.0)))
            # Before the call, so that the time it takes is counted against us.
            asked_at_s, left_s = time.monotonic(), self.left_s
            if left_s <= 0:
                raise NotRenewed(self._timing.renew_deadline_s)
            try:
                await self._store.keep_alive(self._lease, timeout_s=left_s)
            except LeaseLost:
                raise
            except StoreError as error:
                log.warning("leader_lease_not_renewed", left_s=round(self.left_s, 1), detail=str(error))
            else:
                self._renewed_at_s = asked_at_s


class Term:
    """One time of leading. `epoch` is its fencing token."""

    def __init__(self, key: str, epoch: int, renewal: _Renewal) -> None:
        self.key = key
        self.epoch = epoch
        self._renewal = renewal
        self._over = False

    @property
    def held(self) -> bool:
        """Whether we may act on the world now. False as soon as the renew deadline has passed."""
        return not self._over and self._renewal.left_s > 0

    @property
    def guard(self) -> Compare:
        """True in etcd for as long as nobody can have followed us."""
        return create_revision(self.key, self.epoch)

    def require(self) -> None:
        """Before an effect that etcd cannot refuse. Raises Deposed."""
        if not self.held:
            raise Deposed(self.epoch)

    def end(self) -> None:
        self._over = True


Lead = Callable[[Term], Awaitable[Any]]
"""What a leader does until it is cancelled. Raising Deposed ends its term, other errors the candidate."""


class Candidate:
    """One process that would lead, and what it knows of the election."""

    def __init__(self, store: Store, prefix: str, id: str, timing: Timing | None = None) -> None:
        self.id = id
        self.who = Candidacy(id=id, started_at_s=time.time())
        self.term: Term | None = None
        self.terms = 0  # how often it became the leader
        self.epoch_rejected = 0  # writes refused because their term was over
        self._store = store
        self._prefix = prefix
        self._timing = timing or Timing()
        self._view: View[str, KeyValue] = View(store, lambda kv: (kv.key, kv))

    @property
    def leading(self) -> bool:
        return self.term is not None and self.term.held

    @property
    def leader(self) -> str | None:
        """Id of who leads, as last heard."""
        oldest = _oldest(self._view.current.values())
        found = Candidacy.of(oldest) if oldest else None
        return found.id if found else None

    async def campaign(self, lead: Lead) -> NoReturn:
        """Lead whenever elected, for ever. Cancelling it resigns, so that the next one can begin at once."""
        backoff = Backoff(first_s=self._timing.retry_s / 4, cap_s=self._timing.retry_s)
        async with live(self._view, self._store, self._prefix):
            while True:
                terms = self.terms
                try:
                    await self._stand(lead)
                except (StoreError, ElectionError) as error:
                    log.warning("candidate_lost", candidate=self.id, detail=str(error))
                if self.terms > terms:
                    backoff.reset()
                await asyncio.sleep(backoff.next_s())

    async def _stand(self, lead: Lead) -> None:
        """From a new lease to its end."""
        asked_at_s = time.monotonic()
        lease = (await self._store.grant(self._timing.lease_s)).id
        renewal = _Renewal(self._store, lease, self._timing, asked_at_s)
        try:
            async with background(election_renewal=renewal.forever()):
                await self._retire_former_selves()
                term = await self._enter(lease, renewal)
                await self._until(term, Place.FIRST)
                await self._lead(term, lead)
        finally:
            with suppress(StoreError):
                await self._store.revoke(lease, timeout_s=RESIGN_S)

    async def _retire_former_selves(self) -> None:
        """A process that was killed and started again need not wait for its own old lease, nor one whose
        key came back with an old state of etcd.

        Should that one still run, the fence refuses it; and as it is the older, it never does this to us.
        """
        for kv in self._view.current.values():
            other = Candidacy.of(kv)
            if other is not None and other.id == self.id and other.started_at_s <= self.who.started_at_s:
                log.info("candidate_replaces_itself", candidate=self.id, epoch=kv.create_revision)
                await self._store.revoke(kv.lease)

    async def _enter(self, lease: int, renewal: _Renewal) -> Term:
        """Put our key in line. Raises StoreError; reading it back settles a write of unknown outcome."""
        key = f"{self._prefix}{lease:x}"
        result = await self._store.txn(
            [absent(key)], [Put(key, msgspec.json.encode(self.who), lease)], [Get(key)]
        )
        written = None if result.succeeded else result.kv(0)
        return Term(key, written.create_revision if written else result.revision, renewal)

    async def _lead(self, term: Term, lead: Lead) -> None:
        self.term = term
        self.terms += 1
        log.info("leader_elected", leader=self.id, epoch=term.epoch)
        try:
            async with background(leading=_coroutine(lead, term)):
                await self._until(term, Place.GONE)
                term.end()
            raise Deposed(term.epoch)
        finally:
            term.end()
            self.term = None
            log.info("leader_stepped_down", leader=self.id, epoch=term.epoch)

    async def _until(self, term: Term, wanted: Place) -> None:
        """Raises Deposed when our key is gone."""
        version = 0
        while True:
            version = await self._view.wait_newer(version)
            found = place(self._view.current, self._view.revision, term.key, term.epoch)
            if found is wanted:
                return
            if found is Place.GONE:
                raise Deposed(term.epoch)


async def _coroutine(lead: Lead, term: Term) -> None:
    await lead(term)


class Fenced:
    """Writes of one term: etcd takes them only while it lasts."""

    def __init__(self, store: Store, candidate: Candidate, term: Term) -> None:
        self.term = term
        self._store = store
        self._candidate = candidate

    async def txn(
        self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()
    ) -> TxnResult:
        """As `Store.txn`. Raises Deposed, and counts it, when the term is over."""
        key, epoch = self.term.key, self.term.epoch
        result = await self._store.txn([*compares, self.term.guard], success, [*failure, Get(key)])
        if result.succeeded:
            return result
        own = result.kv(len(failure))
        if own is None or own.create_revision != epoch:
            self._candidate.epoch_rejected += 1
            log.warning("epoch_rejected", leader=self._candidate.id, epoch=epoch)
            raise Deposed(epoch)
        return TxnResult(False, result.revision, result.results[:-1])

    async def put(self, key: str, value: bytes, lease: int = 0) -> None:
        """Write whatever was there. Raises Deposed, OutcomeUnknown, LeaseLost."""
        await self.txn([], [Put(key, value, lease)])
