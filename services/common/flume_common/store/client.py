"""The etcd client: keys, transactions, leases, watches, each with a deadline. asyncio over gRPC.

What it does not do: cache, locks, elections, retries of writes whose outcome is unknown.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc
from flume_protos.etcd import etcd_pb2 as pb

from flume_common.store import values
from flume_common.store.config import StoreConfig
from flume_common.store.errors import LeaseLost, StoreUnavailable, TxnTooLarge
from flume_common.store.history import History
from flume_common.store.transport import Link, Metadata, Send, Transport
from flume_common.store.values import Compare, Get, GetPrefix, KeyValue, Op, Snapshot, TxnResult
from flume_common.store.watch import Watch, open_watch


class _Reply(Protocol):
    @property
    def header(self) -> pb.ResponseHeader: ...


R = TypeVar("R", bound=_Reply)


@dataclass(frozen=True, slots=True)
class LeaseGrant:
    """A lease as etcd granted it."""

    id: int
    ttl_s: float  # at least what was asked for


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """What the endpoint in use says of itself."""

    endpoint: str
    version: str
    db_bytes: int
    has_leader: bool
    is_leader: bool
    revision: int


class Store:
    """etcd, as the services use it. Made by `connect`; every method may raise a StoreError."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.history = History()
        self.watch_resyncs: Counter[str] = Counter()  # by reason
        self.lease_losses = 0
        self.txn_conflicts = 0  # transactions whose conditions did not hold

    @property
    def connected(self) -> bool:
        """Whether etcd answered the last time anything was asked."""
        return self.transport.connected

    async def get(self, key: str) -> KeyValue | None:
        reply = await self._range(pb.RangeRequest(key=key.encode()))
        return KeyValue.from_proto(reply.kvs[0]) if reply.kvs else None

    async def range(self, prefix: str) -> Snapshot:
        """All keys under `prefix`, which ends in `/`, as of now."""
        reply = await self._range(pb.RangeRequest(key=prefix.encode(), range_end=values.prefix_end(prefix)))
        items = (KeyValue.from_proto(kv) for kv in reply.kvs)
        return Snapshot(reply.header.revision, {item.key: item for item in items})

    async def put(self, key: str, value: bytes, lease: int = 0) -> int:
        """Write whatever was there. Returns the revision. Raises OutcomeUnknown, LeaseLost."""
        request = pb.PutRequest(key=key.encode(), value=value, lease=lease)

        async def send(link: Link, timeout_s: float, metadata: Metadata) -> pb.PutResponse:
            reply: pb.PutResponse = await link.kv.Put(request, timeout=timeout_s, metadata=metadata)
            return reply

        try:
            reply = await self._ask("Put", send, repeatable=False)
        except LeaseLost:
            raise LeaseLost(lease) from None
        return int(reply.header.revision)

    async def delete(self, key: str) -> bool:
        """Whether there was such a key. Raises OutcomeUnknown."""
        return await self._delete(pb.DeleteRangeRequest(key=key.encode())) > 0

    async def delete_prefix(self, prefix: str) -> int:
        """How many keys there were under `prefix`, which ends in `/`. Raises OutcomeUnknown."""
        return await self._delete(
            pb.DeleteRangeRequest(key=prefix.encode(), range_end=values.prefix_end(prefix))
        )

    async def txn(
        self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()
    ) -> TxnResult:
        """All of `success` at one revision if all `compares` hold, otherwise all of `failure`.

        Raises TxnTooLarge before sending, OutcomeUnknown (unless it only reads), LeaseLost.
        """
        largest = max(len(compares), len(success), len(failure))
        if largest > values.MAX_TXN_OPS:
            raise TxnTooLarge(largest, values.MAX_TXN_OPS)
        request = pb.TxnRequest(
            compare=[compare.to_proto() for compare in compares],
            success=[op.to_proto() for op in success],
            failure=[op.to_proto() for op in failure],
        )

        async def send(link: Link, timeout_s: float, metadata: Metadata) -> pb.TxnResponse:
            reply: pb.TxnResponse = await link.kv.Txn(request, timeout=timeout_s, metadata=metadata)
            return reply

        reads_only = all(isinstance(op, Get | GetPrefix) for op in (*success, *failure))
        try:
            reply = await self._ask("Txn", send, repeatable=reads_only)
        except LeaseLost:
            raise LeaseLost(_lease_of(success, failure)) from None
        if not reply.succeeded:
            self.txn_conflicts += 1
        ops = success if reply.succeeded else failure
        results = tuple(values.result_of(op, part) for op, part in zip(ops, reply.responses, strict=True))
        return TxnResult(reply.succeeded, reply.header.revision, results)

    async def grant(self, ttl_s: float) -> LeaseGrant:
        """A new lease. One granted to a call that got no answer runs out by itself."""
        request = pb.LeaseGrantRequest(ttl=math.ceil(ttl_s))

        async def send(link: Link, timeout_s: float, metadata: Metadata) -> pb.LeaseGrantResponse:
            reply: pb.LeaseGrantResponse = await link.lease.LeaseGrant(
                request, timeout=timeout_s, metadata=metadata
            )
            return reply

        reply = await self.transport.call("LeaseGrant", send, repeatable=True)
        return LeaseGrant(reply.id, float(reply.ttl))

    async def keep_alive(self, lease: int, timeout_s: float | None = None) -> float:
        """Renew once; returns the TTL in seconds. Raises LeaseLost: etcd says so by a TTL of 0."""

        async def send(link: Link, timeout_s: float, metadata: Metadata) -> pb.LeaseKeepAliveResponse:
            # A stream of one message: a longer one would stick to an endpoint that hangs.
            call = link.lease.LeaseKeepAlive(
                iter((pb.LeaseKeepAliveRequest(id=lease),)), timeout=timeout_s, metadata=metadata
            )
            try:
                reply: Any = await call.read()
            finally:
                call.cancel()
            if reply is grpc.aio.EOF:
                self.transport.failed(link, "stream ended")
                raise StoreUnavailable("LeaseKeepAlive", f"{link.address} ended the stream")
            answer: pb.LeaseKeepAliveResponse = reply
            return answer

        reply = await self.transport.call("LeaseKeepAlive", send, repeatable=True, timeout_s=timeout_s)
        if reply.ttl <= 0:
            raise LeaseLost(lease)
        return float(reply.ttl)

    async def revoke(self, lease: int, timeout_s: float | None = None) -> None:
        """End a lease and delete its keys. A lease that is gone already is no error."""

        async def send(link: Link, timeout_s: float, metadata: Metadata) -> pb.LeaseRevokeResponse:
            reply: pb.LeaseRevokeResponse = await link.lease.LeaseRevoke(
                pb.LeaseRevokeRequest(id=lease), timeout=timeout_s, metadata=metadata
            )
            return reply

        try:
            await self.transport.call("LeaseRevoke", send, repeatable=True, timeout_s=timeout_s)
        except LeaseLost:
            return

    async def time_to_live(self, lease: int) -> float | None:
        """Seconds the lease has left; None when etcd does not know it."""

        async def send(link: Link, timeout_s: float, metadata: Metadata) -> pb.LeaseTimeToLiveResponse:
            reply: pb.LeaseTimeToLiveResponse = await link.lease.LeaseTimeToLive(
                pb.LeaseTimeToLiveRequest(id=lease), timeout=timeout_s, metadata=metadata
            )
            return reply

        reply = await self.transport.call("LeaseTimeToLive", send, repeatable=True)
        return float(reply.ttl) if reply.ttl >= 0 else None

    async def status(self, timeout_s: float | None = None) -> StoreStatus:
        """Of the endpoint in use; needs no leader."""

        async def send(link: Link, timeout_s: float, metadata: Metadata) -> StoreStatus:
            reply: pb.StatusResponse = await link.maintenance.Status(
                pb.StatusRequest(), timeout=timeout_s, metadata=metadata
            )
            return StoreStatus(
                endpoint=link.address,
                version=reply.version,
                db_bytes=reply.db_size,
                has_leader=reply.leader != 0,
                is_leader=reply.leader == reply.header.member_id,
                revision=reply.header.revision,
            )

        return await self.transport.call("Status", send, repeatable=True, timeout_s=timeout_s)

    async def compact(self, revision: int) -> None:
        """Forget the history before `revision`; watches that still need it resync."""
        request = pb.CompactionRequest(revision=revision)

        async def send(link: Link, timeout_s: float, metadata: Metadata) -> pb.CompactionResponse:
            reply: pb.CompactionResponse = await link.kv.Compact(
                request, timeout=timeout_s, metadata=metadata
            )
            return reply

        await self.transport.call("Compact", send, repeatable=True)

    def watch(self, prefix: str, *, relist: bool = False) -> AbstractAsyncContextManager[Watch]:
        """The keys under `prefix` and every change to them from there on; see `Watch`.

        Entering reads the first snapshot and waits for as long as etcd is away.
        Raises StoreRefused when we may not read there.
        """
        return open_watch(self, prefix, relist=relist)

    async def _range(self, request: pb.RangeRequest) -> pb.RangeResponse:
        async def send(link: Link, timeout_s: float, metadata: Metadata) -> pb.RangeResponse:
            reply: pb.RangeResponse = await link.kv.Range(request, timeout=timeout_s, metadata=metadata)
            return reply

        return await self._ask("Range", send, repeatable=True)

    async def _delete(self, request: pb.DeleteRangeRequest) -> int:
        async def send(link: Link, timeout_s: float, metadata: Metadata) -> pb.DeleteRangeResponse:
            reply: pb.DeleteRangeResponse = await link.kv.DeleteRange(
                request, timeout=timeout_s, metadata=metadata
            )
            return reply

        return int((await self._ask("DeleteRange", send, repeatable=False)).deleted)

    async def _ask(self, name: str, send: Send[R], *, repeatable: bool) -> R:
        """A call whose answer is linearizable, and so a part of the history."""
        mark = self.history.mark()
        reply = await self.transport.call(name, send, repeatable=repeatable)
        self.history.note(reply.header, mark)
        return reply


def _lease_of(*branches: Sequence[Op]) -> int:
    """The lease a transaction's puts name; etcd does not say which one it misses."""
    leases = (op.lease for branch in branches for op in branch if isinstance(op, values.Put) and op.lease)
    return next(leases, 0)


@asynccontextmanager
async def connect(config: StoreConfig) -> AsyncIterator[Store]:
    """A store for as long as the body runs. Needs no etcd yet: the first call does.

    Raises OSError when a certificate can't be read.
    """
    transport = Transport(config)
    try:
        yield Store(transport)
    finally:
        await transport.close()
