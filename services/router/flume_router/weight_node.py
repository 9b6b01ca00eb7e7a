"""One weight node as the router sees it: its channel, its load, and whether it still answers.

A node is trusted until a call to it fails or until it is silent: sequences wait for it, and for a while
it has sent no reply and answered no question either. A waiting sequence alone proves nothing, as its
prompt may be long or the KV full; so the node is asked, and the question goes through its engine.
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

from flume_router.errors import WeightNodeSilent
from flume_router.pick import Candidate

log = structlog.get_logger(__name__)

_SUSPECT_S = 5.0
_ASK_EVERY_S = 1.0
_ASK_DEADLINE_S = 2.5  # a weight node itself waits 2 s for its engine
Call = grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateReply]


class WeightNode:
    """`described` is None until it has answered Describe."""

    def __init__(self, member: Member, *, silence_s: float, changed: Callable[[], None]) -> None:
        """`changed` is called when `answering` turns; `silence_s`: how long it may say nothing."""
        self.id = member.id
        self.address = member.address
        self.stub: rpc.WeightStub | None = None
        self.described: pb.DescribeReply | None = None
        self.listed = True
        self.answering = True
        self.outstanding = 0
        self.retired = asyncio.Event()
        self._silence_s = silence_s
        self._changed = changed
        self._in_doubt = asyncio.Event()
        self._waiting: set[asyncio.Timeout] = set()
        self._picked_at_s = 0.0
        self._suspect_until_s = 0.0
        self._quiet_since_s = (
            time.monotonic()
        )  # the last sign of life, or when somebody began to wait for one

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
            self._quiet_since_s = time.monotonic()
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
            raise WeightNodeSilent(self.id, self._silence_s) from None
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
        """Ask whether it lives while there is doubt, and tell those who wait when it is silent."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._in_doubt.wait(), _ASK_EVERY_S)
            self._in_doubt.clear()
            if self._doubted and not await self._answers() and self._quiet_s > self._silence_s:
                self._fall_silent()

    @property
    def _quiet_s(self) -> float:
        return time.monotonic() - self._quiet_since_s

    @property
    def _doubted(self) -> bool:
        return not self.answering or (bool(self._waiting) and self._quiet_s > _ASK_EVERY_S)

    async def _answers(self) -> bool:
        assert self.stub is not None
        deadline_s = min(_ASK_DEADLINE_S, self._silence_s)
        try:
            await self.stub.ListSequences(pb.ListSequencesRequest(), timeout=deadline_s)
        except grpc.aio.AioRpcError as error:
            log.debug("weight_node_does_not_answer", weight_node=self.id, code=error.code().name)
            return False
        self._heard()
        return True

    def _heard(self) -> None:
        self._quiet_since_s = time.monotonic()
        if not self.answering:
            self.answering = True
            self._changed()

    def _fall_silent(self) -> None:
        if self.answering:
            log.warning("weight_node_silent", weight_node=self.id, quiet_s=round(self._quiet_s, 1))
        self.answering = False
        now = asyncio.get_running_loop().time()
        for patience in self._waiting:
            patience.reschedule(now)
