"""Calls to whichever etcd endpoint answers: deadlines, retries that are safe, login. No key or value here.

One channel per endpoint; all calls go to the same one until it fails, then to the next. (One gRPC
target with round_robin takes only literal addresses, needs a common certificate name, and would send
every third call to a member that is stopped.)
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import structlog
from flume_protos.etcd import etcd_pb2 as pb
from flume_protos.etcd import etcd_pb2_grpc as rpc

from flume_common.backoff import Backoff
from flume_common.store.config import StoreConfig
from flume_common.store.errors import (
    LeaseLost,
    OutcomeUnknown,
    StoreError,
    StoreRefused,
    StoreUnavailable,
    Verdict,
    verdict,
)

log = structlog.get_logger(__name__)

R = TypeVar("R")
Metadata = tuple[tuple[str, str], ...]
AUTH_DISABLED = "etcdserver: authentication is not enabled"


@dataclass(frozen=True, slots=True)
class Link:
    """One endpoint and the stubs on its channel."""

    address: str
    channel: grpc.aio.Channel
    kv: Any
    watch: Any
    lease: Any
    auth: Any
    maintenance: Any

    @classmethod
    def open(cls, config: StoreConfig, address: str) -> Link:
        channel = config.channel(address)
        stubs: tuple[Any, ...] = (rpc.KVStub, rpc.WatchStub, rpc.LeaseStub, rpc.AuthStub, rpc.MaintenanceStub)
        return cls(address, channel, *(stub(channel) for stub in stubs))


Send = Callable[[Link, float, Metadata], Awaitable[R]]
"""Sends one attempt: (link, deadline in s, metadata) -> reply. Raises AioRpcError."""


class Transport:
    """The endpoints, which of them we use, and our login."""

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        self.connected = False  # the last call was answered
        self._links = [Link.open(config, address) for address in config.addresses]
        # Spreads the members of a cluster over the endpoints.
        self._at = random.randrange(len(self._links))
        self._token: str | None = None
        self._login = asyncio.Lock()

    @property
    def link(self) -> Link:
        """The endpoint in use."""
        return self._links[self._at]

    async def close(self) -> None:
        await asyncio.gather(*(link.channel.close() for link in self._links))

    def succeeded(self, link: Link) -> None:
        if not self.connected:
            log.info("store_connected", endpoint=link.address)
        self.connected = True

    def failed(self, link: Link, detail: str) -> None:
        """Go on with the next endpoint, unless another call has already moved on from this one."""
        if self.connected:
            log.warning("store_disconnected", endpoint=link.address, detail=detail)
        self.connected = False
        if self.link is link:
            self._at = (self._at + 1) % len(self._links)

    def forget_login(self, metadata: Metadata) -> None:
        """Log in again before the next call, unless that has happened since `metadata` was made."""
        if ("token", self._token) in metadata:
            self._token = None

    async def metadata(self, timeout_s: float | None = None) -> Metadata:
        """`hasleader` turns a silent hang on a member without a leader into an error."""
        token = await self._current_token(timeout_s)
        return (("hasleader", "true"), *((("token", token),) if token else ()))

    async def call(
        self,
        name: str,
        send: Send[R],
        *,
        repeatable: bool,
        timeout_s: float | None = None,
        login: bool = True,
    ) -> R:
        """Send until answered, at most for `timeout_s`.

        `repeatable` says that doing it twice does no harm; otherwise only a call that surely was not
        applied is sent again. Raises StoreUnavailable, OutcomeUnknown (only when not repeatable),
        StoreRefused, or LeaseLost(0) when etcd does not know the lease.
        """
        attempts = _Attempts(len(self._links), timeout_s or self.config.timeout_s, repeatable)
        relogged = False
        while True:
            link = self.link
            metadata = await self.metadata(attempts.left_s) if login else ()
            try:
                reply = await send(link, attempts.allowance_s(), metadata)
            except grpc.aio.AioRpcError as error:
                detail = error.details() or error.code().name
                judged = verdict(error.code(), detail)
                if judged is Verdict.NEW_TOKEN and self.config.user and not relogged:
                    relogged = True
                    self.forget_login(metadata)
                    continue
                failure = self._failure(name, link, judged, error.code(), detail, repeatable)
                if not isinstance(failure, StoreUnavailable) or attempts.exhausted:
                    raise failure from None
            else:
                self.succeeded(link)
                return reply
            await attempts.pause()

    def _failure(
        self, name: str, link: Link, judged: Verdict, code: grpc.StatusCode, detail: str, repeatable: bool
    ) -> StoreError:
        """The error a failed attempt amounts to; StoreUnavailable means it may be sent again."""
        if judged is Verdict.NO_LEASE:
            self.succeeded(link)
            return LeaseLost(0)
        if judged in (Verdict.REFUSED, Verdict.NEW_TOKEN):
            self.succeeded(link)
            return StoreRefused(name, code, detail)
        self.failed(link, detail)
        if judged is Verdict.UNKNOWN and not repeatable:
            return OutcomeUnknown(name, detail)
        return StoreUnavailable(name, f"{link.address}: {detail}")

    async def _current_token(self, timeout_s: float | None) -> str | None:
        if self.config.user is None:
            return None
        async with self._login:
            if self._token is None:
                self._token = await self._authenticate(timeout_s)
            return self._token

    async def _authenticate(self, timeout_s: float | None) -> str:
        request = pb.AuthenticateRequest(name=self.config.user, password=self.config.password)

        async def send(link: Link, timeout_s: float, metadata: Metadata) -> pb.AuthenticateResponse:
            reply: pb.AuthenticateResponse = await link.auth.Authenticate(
                request, timeout=timeout_s, metadata=metadata
            )
            return reply

        try:
            reply = await self.call("Authenticate", send, repeatable=True, timeout_s=timeout_s, login=False)
            return reply.token
        except StoreRefused as error:
            if error.detail.startswith(AUTH_DISABLED):
                return ""  # as etcd's own client: a login that nobody asks for does no harm
            raise


class _Attempts:
    """How long one call may still take, and how long its next attempt."""

    def __init__(self, num_endpoints: int, timeout_s: float, repeatable: bool) -> None:
        self._deadline_s = time.monotonic() + timeout_s
        self._num_endpoints = num_endpoints
        self._repeatable = repeatable
        self._made = 0
        self._backoff = Backoff()

    @property
    def left_s(self) -> float:
        return self._deadline_s - time.monotonic()

    @property
    def exhausted(self) -> bool:
        return self.left_s <= 0.01

    def allowance_s(self) -> float:
        """A read leaves half of its time for another endpoint; a write gets one try and all of it."""
        self._made += 1
        return max(self.left_s / 2 if self._repeatable and self._made == 1 else self.left_s, 0.01)

    async def pause(self) -> None:
        """No pause before an endpoint that has not been tried yet."""
        if self._made % self._num_endpoints == 0:
            await asyncio.sleep(max(0.0, min(self._backoff.next_s(), self.left_s)))
