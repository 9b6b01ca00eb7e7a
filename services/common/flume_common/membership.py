"""Who is in the cluster: members registered under leases, and a live view of them.

A member's key exists while its lease is renewed, and the key's create revision is the member's epoch.
Losing the lease cancels nothing here: the member registers again, with the same id and a new epoch,
as soon as etcd answers. What must not go on under an old epoch is refused by whoever checks epochs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Annotated, Any, NamedTuple

import msgspec
import structlog

from flume_common.backoff import Backoff
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
    leave_by_s: float = 0.0  # DRAINING: Unix time at which what it holds is to be elsewhere; 0: none
    reason: str = ""  # why it is not READY: a Reason; empty: nothing to say
    lanes: tuple[str, ...] | None = None  # weight: attention nodes it has a lane to; None: not known
    canary: str = ""  # router: what its last canaries showed, a Verdict; empty: nothing yet
    epoch: int = 0  # of the key, not in the JSON: its create revision

    def encode(self) -> bytes:
        fields: dict[str, Any] = msgspec.to_builtins(self)
        del fields["epoch"]
        return msgspec.json.encode(fields)

    @classmethod
    def decode(cls, kv: KeyValue) -> Member:
        """Raises ValueError when the value is no member."""
        return msgspec.structs.replace(msgspec.json.decode(kv.value, type=cls), epoch=kv.create_revision)


class Life(NamedTuple):
    """One registration, from its creation until its lease is lost."""

    epoch: int
    lease: int


class Registration:
    """Our own membership. `member` is what we last said of ourselves, written or not yet."""

    def __init__(self, store: Store, keys: Keys, member: Member, ttl_s: float) -> None:
        self.key = keys.member(member.role, member.id)
        self.member = member
        self.epoch = 0  # of our key; a new one after a lost lease
        self.lease = 0  # 0 while we are not registered
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
            return Life(self.epoch, self.lease)

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
                    await self._stay(lease)
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

    async def _stay(self, lease: HeldLease) -> None:
        """Keep our key as it should be. Only the loss of the lease ends this; etcd being away does not."""
        backoff = Backoff(cap_s=self._ttl_s / 3)
        while True:
            self._poked.clear()
            try:
                settled = await self._publish(lease.id)
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

    async def _publish(self, lease: int) -> bool:
        """One pass: read our key, and do what it lacks. False: look again soon.

        Reading first makes an earlier write whose outcome is unknown harmless.
        """
        value = self.member.encode()
        kv = await self._store.get(self.key)
        if kv is None:
            result = await self._store.txn([absent(self.key)], [Put(self.key, value, lease)])
            if result.succeeded:
                await self._registered(lease, epoch=result.revision)
            return result.succeeded
        if kv.lease != lease:
            return await self._contest(kv)
        if kv.create_revision != self.epoch or not self.registered:
            await self._registered(lease, epoch=kv.create_revision)
        if kv.value == value:
            return True
        unchanged = mod_revision(self.key, kv.mod_revision)
        return (await self._store.txn([unchanged], [Put(self.key, value, lease)])).succeeded

    async def _registered(self, lease: int, epoch: int) -> None:
        async with self._moved:
            self.lease, self.epoch = lease, epoch
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
    store: Store, keys: Keys, member: Member, *, ttl_s: float = 10.0
) -> AsyncIterator[Registration]:
    """Be a member while the body runs. Entering waits until we are one, for as long as etcd is away.

    `ttl_s` is how long others go on counting on a member that died without saying so.
    Raises StoreRefused when etcd does not let us in the first time.
    """
    registration = Registration(store, keys, member, ttl_s)
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
