"""One weight node as the router sees it: its channel, its load, and whether it works.

A node is trusted until a call to it fails or until it is silent. A waiting sequence alone proves nothing:
its prompt may be long, the model slow or the KV full. So the node is asked, and its supervisor answers at
once with how long ago its engine last made progress. A node is silent when the supervisor does not answer,
or says that the engine stands still. Its sequences are sent elsewhere if there is another node; where there
is none, sending them again to the same one could only lose what it has computed, so they wait for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import grpc
import structlog
from flume_common.membership import Member
from flume_protos.v1 import weight_pb2 as pb
from flume_protos.v1 import weight_pb2_grpc as rpc

from flume_router.canary import Canary
from flume_router.errors import WeightNodeSilent
from flume_router.pick import Candidate

log = structlog.get_logger(__name__)

_SUSPECT_S = 5.0
_ASK_EVERY_S = 1.0
_ASK_DEADLINE_S = 2.5
Call = grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateReply]


class WeightNode:
    """`described` is None until it has answered Describe."""

    def __init__(
        self,
        member: Member,
        *,
        silence_s: float,
        changed: Callable[[], None],
        elsewhere: Callable[[], bool] = lambda: True,
        standstill_s: float = 0.0,
        canary_interval_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`changed` is called when `answering` turns; `silence_s`: how long there may be no sign of work.

        `elsewhere`: whether another node could take its sequences. Where none can, they are given up only
        when it has stood still for `standstill_s`.
        """
        self.id = member.id
        self.address = member.address
        self.stub: rpc.WeightStub | None = None
        self.described: pb.DescribeReply | None = None
        self.listed = True
        self.unable = ""  # why it cannot serve now, by its own word
        self.answering = True
        self.outstanding = 0
        self.retired = asyncio.Event()
        self._silence_s = silence_s
        self._standstill_s = max(silence_s, standstill_s)
        self._changed = changed
        self._elsewhere = elsewhere
        self.canary = Canary(
            member.id,
            interval_s=canary_interval_s,
            able=lambda: self.listed and not self.unable,
            changed=changed,
        )
        self._in_doubt = asyncio.Event()
        self._waiting: set[asyncio.Timeout] = set()
        self._picked_at_s = 0.0
        self._suspect_until_s = 0.0
        self.quiet_since_s = time.monotonic()
        """The last sign that it works, or when somebody began to wait for one."""

    @property
    def usable(self) -> bool:
        """True if a sequence may be sent there."""
        return not self.why_not

    @property
    def why_not(self) -> str:
        """Why no sequence may be sent there; empty where it may."""
        if self.unable:
            return self.unable
        if self.described is None:
            return f"{self.id} has not answered yet"
        if not self.answering:
            return f"{self.id} does not answer"
        return f"the canary through {self.id} failed: {self.canary.reason}" if self.canary.failed else ""

    def candidate(self, key: str) -> Candidate:
        suspect = time.monotonic() < self._suspect_until_s
        return Candidate(key, self.outstanding, self._picked_at_s, self.listed, suspect)

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Counts a sequence for as long as it runs."""
        self._picked_at_s = time.monotonic()
        self.outstanding += 1
        try:
            yield
        finally:
            self.outstanding -= 1

    def generate(
        self, request: pb.GenerateRequest, *, timeout_s: float, metadata: tuple[tuple[str, str], ...]
    ) -> Call:
        assert self.stub is not None, "a node is a candidate only once it has answered"
        call: Call = self.stub.Generate(request, timeout=timeout_s, metadata=metadata)
        return call

    async def read(self, call: Call) -> pb.GenerateReply | None:
        """The next reply; None at the end. Raises AioRpcError, WeightNodeSilent."""
        if not self._waiting:
            self.quiet_since_s = time.monotonic()
        try:
            async with asyncio.timeout(None) as patience:
                self._waiting.add(patience)
                try:
                    reply = await call.read()
                finally:
                    self._waiting.discard(patience)
        except TimeoutError:
            if not patience.expired():
                raise
            raise WeightNodeSilent(self.id, self._quiet_s) from None
        if reply is grpc.aio.EOF:
            return None
        self._heard()
        assert isinstance(reply, pb.GenerateReply)
        return reply

    def suspect(self) -> None:
        """A call to it has just failed: others first for a while, and nobody here before it answers."""
        self._suspect_until_s = time.monotonic() + _SUSPECT_S
        self.answering = False
        self._in_doubt.set()

    async def keep_asking(self) -> NoReturn:
        """Ask whether it works while there is doubt, and end the waiting of sequences when it is silent."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._in_doubt.wait(), _ASK_EVERY_S)
            self._in_doubt.clear()
            if self._doubted and not await self._works() and self._quiet_s > self._silence_s:
                self._fall_silent()

    @property
    def _quiet_s(self) -> float:
        return time.monotonic() - self.quiet_since_s

    @property
    def _doubted(self) -> bool:
        return not self.answering or (bool(self._waiting) and self._quiet_s > _ASK_EVERY_S)

    async def _works(self) -> bool:
        """Ask its supervisor, whom no step of the engine holds up."""
        assert self.stub is not None
        deadline_s = min(_ASK_DEADLINE_S, self._silence_s)
        try:
            status = await self.stub.Status(pb.WeightStatusRequest(), timeout=deadline_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:  # of an older version
                return await self._lists(deadline_s)
            log.debug("weight_node_does_not_answer", weight_node=self.id, code=error.code().name)
            return False
        quiet_s = status.engine.quiet_s
        if not status.working or quiet_s > self._silence_s:
            return False
        self._heard(quiet_s)
        return True

    async def _lists(self, deadline_s: float) -> bool:
        assert self.stub is not None
        try:
            await self.stub.ListSequences(pb.ListSequencesRequest(), timeout=deadline_s)
        except grpc.aio.AioRpcError:
            return False
        self._heard()
        return True

    def _heard(self, quiet_s: float = 0.0) -> None:
        """It worked so many seconds ago."""
        self.quiet_since_s = max(self.quiet_since_s, time.monotonic() - quiet_s)
        if not self.answering:
            self.answering = True
            self._changed()

    def _fall_silent(self) -> None:
        if self.answering:
            log.warning("weight_node_silent", weight_node=self.id, quiet_s=round(self._quiet_s, 1))
        self.answering = False
        if not self._elsewhere() and self._quiet_s < self._standstill_s:
            return
        now = asyncio.get_running_loop().time()
        for patience in self._waiting:
            patience.reschedule(now)
