"""Who is in the cluster: members registered under leases, and a live view of them.

A member's key exists while its lease is renewed, and the key's create revision is the member's epoch.
Losing the lease cancels nothing here: the member registers again, with the same id and a new epoch,
as soon as etcd answers. So it does when the cluster has another incarnation, as epochs of the former one are
over. What must not go on under an old epoch is refused by whoever checks epochs.

A message that claims an epoch can be told from another's: it carries the secret of the process that
registered, of which the member's record has the digest.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Annotated, Any, NamedTuple

import msgspec
import structlog

from flume_common.backoff import Backoff
from flume_common.incarnation import Incarnation
from flume_common.keys import Keys
from flume_common.store import (
    Delete,
    HeldLease,
    KeyValue,
    LeaseLost,
    Put,
    Store,
    StoreError,
    StoreRefused,
    TxnResult,
    View,
    absent,
    create_revision,
    hold_lease,
    live,
    mod_revision,
)
from flume_common.tasks import background

log = structlog.get_logger(__name__)

LOOK_S = 2.0
"""How often a member reads its own key: others may have written or deleted it."""


class Role(StrEnum):
    """The four services."""

    WEIGHT = "weight"
    ATTENTION = "attention"
    ROUTER = "router"
    CONTROLLER = "controller"


class State(StrEnum):
    """A member's life: PREPARING -> READY -> DRAINING -> gone. Back to PREPARING while it cannot serve."""

    PREPARING = "PREPARING"
    READY = "READY"
    DRAINING = "DRAINING"


Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """What a member says of itself; the JSON value of its key."""

    id: str
    role: Role
    state: State
    address: str  # host:port of its gRPC server
    host: str
    pid: int
    version: str
    protocol_version: int
    started_at_s: float  # Unix time
    kv_capacity_tokens: Count = 0
    kv_used_tokens: Count = 0
    sequences: Count = 0
    model: str = ""
    context_tokens: int = 0
    http_address: str = ""
    metrics_address: str = ""  # host:port of its /metrics
    engine_deaths: int = 0  # since this process started
    last_engine_error: str = ""  # of the last of them: the cause, and what became of requests
    last_engine_death_s: float = 0.0  # Unix time
    model_failures: int = 0  # requests that ended because the model's output was invalid, likewise
    last_model_failure: str = ""
    leave_by_s: float = 0.0  # DRAINING: Unix time at which what it holds is to be elsewhere; 0: none
    secret_digest: str = (
        ""  # of what only its process knows; empty: what it sends cannot be told from others'
    )
    reason: str = ""  # why it is not READY: a Reason; empty: nothing to say
    lanes: tuple[str, ...] | None = None  # weight: attention nodes it has a lane to; None: not known
    canary: str = ""  # router: why canaries come through no weight node; empty: they do, or nothing is known
    epoch: int = 0  # of the key, not in the JSON: its create revision

    def encode(self) -> bytes:
        fields: dict[str, Any] = msgspec.to_builtins(self)
        del fields["epoch"]
        return msgspec.json.encode(fields)

    @classmethod
    def decode(cls, kv: KeyValue) -> Member:
        """Raises ValueError when the value is no member."""
        return msgspec.structs.replace(msgspec.json.decode(kv.value, type=cls), epoch=kv.create_revision)


def new_secret() -> bytes:
    """For one process; see `Member.secret_digest`."""
    return secrets.token_bytes(16)


def digest_of(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


class Life(NamedTuple):
    """One registration, from its creation until its lease is lost or its incarnation is over."""

    epoch: int
    lease: int
    incarnation: str = ""  # empty where none is followed
    ordinal: int = 0  # of the incarnation, as this process counts them
    number: int = 0  # of lives, from 1


class Registration:
    """Our own membership. `member` is what we last said of ourselves, written or not yet."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        member: Member,
        ttl_s: float,
        incarnation: Incarnation | None = None,
    ) -> None:
        self.key = keys.member(member.role, member.id)
        self.member = member
        self.epoch = 0  # of our key; a new one after a lost lease
        self.lease = 0  # 0 while we are not registered
        self.life = Life(0, 0)  # the present one, or the last
        self._incarnation = incarnation
        self._written = (0, 0)  # revision of our last write, and in which life of the store's history
        self._store = store
        self._ttl_s = ttl_s
        self._poked = asyncio.Event()
        self._moved = asyncio.Condition()

    @property
    def registered(self) -> bool:
        """Whether, as far as we know, others see us."""
        return self.lease != 0

    async def update(self, **changes: Any) -> None:
        """Change fields of `member`, e.g. `state=State.DRAINING`. Never fails and never waits for etcd.

        Changes made before the last ones are written are written together with them, when etcd is there.
        """
        self.member = msgspec.structs.replace(self.member, **changes)
        self._poked.set()

    async def wait_registered(self, after: int = 0) -> Life:
        """Waits until we are registered under an epoch newer than `after`."""
        async with self._moved:
            await self._moved.wait_for(lambda: self.registered and self.epoch > after)
            return self.life

    async def wait_next(self, after: Life) -> Life:
        """Wait until we are registered in a life after that one."""
        async with self._moved:
            await self._moved.wait_for(lambda: self.registered and self.life.number > after.number)
            return self.life

    def look(self) -> None:
        """Read our key soon: somebody has seen signs that it is not as it should be."""
        self._poked.set()

    async def live(self) -> None:
        """Be registered, for ever. Raises StoreRefused when that is refused the very first time."""
        backoff = Backoff(cap_s=self._ttl_s / 3)
        while True:
            try:
                async with hold_lease(self._store, self._ttl_s) as lease:
                    backoff.reset()
                    await self._stay_for_incarnation(lease)
                log.warning("member_incarnation_over", member=self.member.id, epoch=self.epoch)
            except LeaseLost as error:
                log.warning(
                    "member_lease_lost", member=self.member.id, lease=f"{error.lease:x}", epoch=self.epoch
                )
            except StoreError as error:
                if isinstance(error, StoreRefused) and self.epoch == 0:
                    raise
                log.warning("member_not_registered", member=self.member.id, detail=str(error))
                await asyncio.sleep(backoff.next_s())
            finally:
                self.lease = 0

    async def _stay_for_incarnation(self, lease: HeldLease) -> None:
        """As `_stay`; ends, too, when the cluster's incarnation is another one."""
        if self._incarnation is None:
            await self._stay(lease, 0)
            return
        ordinal = self._incarnation.ordinal
        async with background(end_with_incarnation=self._poke_after(self._incarnation, ordinal)):
            await self._stay(lease, ordinal)

    async def _poke_after(self, incarnation: Incarnation, ordinal: int) -> None:
        await incarnation.wait_newer(ordinal)
        self._poked.set()

    def _is_over(self, ordinal: int) -> bool:
        return self._incarnation is not None and self._incarnation.ordinal != ordinal

    async def _stay(self, lease: HeldLease, ordinal: int) -> None:
        """Keep our key as it should be. The loss of the lease ends this, and another incarnation; etcd being
        away does not."""
        backoff = Backoff(cap_s=self._ttl_s / 3)
        while not self._is_over(ordinal):
            self._poked.clear()
            try:
                settled = await self._publish(lease.id, ordinal)
            except LeaseLost:
                raise
            except StoreError as error:
                if isinstance(error, StoreRefused) and self.epoch == 0:
                    raise
                log.warning("member_not_written", member=self.member.id, detail=str(error))
                await asyncio.sleep(backoff.next_s())
                continue
            backoff.reset()
            # A key that others wrote or deleted is put right by the next look.
            await self._wait_poked(min(LOOK_S, self._ttl_s) if settled else self._ttl_s / 10)

    async def _wait_poked(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._poked.wait()
        except TimeoutError:
            pass

    async def _publish(self, lease: int, ordinal: int) -> bool:
        """One pass: read our key, and do what it lacks. False: look again soon.

        Reading first makes an earlier write whose outcome is unknown harmless.
        """
        value = self.member.encode()
        kv = await self._store.get(self.key)
        if kv is None:
            return await self._create(value, lease, ordinal)
        if kv.lease != lease:
            return await self._contest(kv)
        self._require_newest(kv)
        if kv.create_revision != self.epoch or not self.registered:
            await self._registered(lease, kv.create_revision, ordinal)
        if kv.value == value:
            return True
        result = await self._store.txn(
            [mod_revision(self.key, kv.mod_revision)], [Put(self.key, value, lease)]
        )
        self._note_written(result)
        return result.succeeded

    async def _create(self, value: bytes, lease: int, ordinal: int) -> bool:
        """Write our key, in this incarnation only: an epoch is worth nothing without it."""
        compares = [absent(self.key)]
        if self._incarnation is not None:
            compares.append(mod_revision(self._incarnation.key, self._incarnation.key_revision))
        result = await self._store.txn(compares, [Put(self.key, value, lease)])
        if result.succeeded:
            self._note_written(result)
            await self._registered(lease, result.revision, ordinal)
        elif self._incarnation is not None:
            await self._incarnation.settle()
        return result.succeeded

    def _note_written(self, result: TxnResult) -> None:
        if result.succeeded:
            self._written = (result.revision, self._store.history.life)

    def _require_newest(self, kv: KeyValue) -> None:
        """That etcd gives back what it said it had written; it does not after a restore."""
        revision, life = self._written
        if kv.mod_revision < revision:
            self._store.history.contradict("own_write_lost", life, kv.mod_revision)

    async def _registered(self, lease: int, epoch: int, ordinal: int) -> None:
        async with self._moved:
            self.lease, self.epoch = lease, epoch
            incarnation = self._incarnation.id if self._incarnation else ""
            self.life = Life(epoch, lease, incarnation, ordinal, self.life.number + 1)
            self._moved.notify_all()
        log.info("member_registered", member=self.member.id, role=self.member.role, epoch=epoch)

    async def _contest(self, kv: KeyValue) -> bool:
        """Somebody's lease holds our key: our own from before, a dead predecessor's, or a namesake's.

        The younger process wins, so that a restart need not wait for a lease to run out and two
        namesakes don't fight: the older one waits until the key is gone.
        """
        self.lease = 0
        try:
            other = Member.decode(kv)
            yields = other.started_at_s > self.member.started_at_s
        except (ValueError, msgspec.DecodeError):
            yields = False
        if yields:
            log.error("member_superseded", member=self.member.id, by_pid=other.pid, by_host=other.host)
            return False
        if kv.lease:
            await self._store.revoke(kv.lease)
        else:
            await self._store.txn([create_revision(self.key, kv.create_revision)], [Delete(self.key)])
        self._poked.set()
        return False


@asynccontextmanager
async def register(
    store: Store,
    keys: Keys,
    member: Member,
    *,
    ttl_s: float = 10.0,
    incarnation: Incarnation | None = None,
) -> AsyncIterator[Registration]:
    """Be a member while the body runs. Entering waits until we are one, for as long as etcd is away.

    `ttl_s` is how long others go on counting on a member that died without saying so. With `incarnation`,
    register again in every new one. Raises StoreRefused when etcd does not let us in the first time.
    """
    registration = Registration(store, keys, member, ttl_s, incarnation)
    async with background(membership=registration.live()):
        await registration.wait_registered()
        yield registration


class Members(View[tuple[Role, str], Member]):
    """All members, live; see View."""

    def of(self, role: Role) -> list[Member]:
        """The members of one role, by id."""
        return sorted((m for m in self.current.values() if m.role is role), key=lambda m: m.id)

    def over_below(self, role: Role, id: str) -> int:
        """Epochs of this member below this one are over, for ever, however old what we know is.

        An epoch is the revision that created a key: one we do not see was deleted, or is to come.
        """
        member = self.current.get((role, id))
        return self.revision + 1 if member is None else member.epoch


def _decode(kv: KeyValue) -> tuple[tuple[Role, str], Member]:
    member = Member.decode(kv)
    if not kv.key.endswith(f"/{member.role}/{member.id}"):
        raise ValueError(f"the value is of {member.role}/{member.id}")
    return (member.role, member.id), member


@asynccontextmanager
async def watch_members(store: Store, keys: Keys) -> AsyncIterator[Members]:
    """A live view of all members. Entering waits for the first state, for as long as etcd is away."""
    members = Members(store, _decode)
    async with live(members, store, keys.members):
        yield members
