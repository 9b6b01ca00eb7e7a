"""Prove now and then that a weight node can serve: it generates two tokens, the second by an attention node.

Only an idle node is asked: tokens of real sequences prove the same. The weight node runs the canary beside
its other sequences and ends it rather than let it displace one, so a node that is full or in a long step is
busy, not failed. A node whose canary failed gets no sequences until one succeeds.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import NoReturn, Protocol

import grpc
import structlog
from flume_protos.v1 import weight_pb2 as pb

log = structlog.get_logger(__name__)

TIMEOUT_S = 10.0
"""For the two tokens; as long as a weight node waits for an attention node in a step."""
AGAIN_S = 1.0
"""Between two canaries of a node whose last one failed: it is used again as soon as it works."""
_SLACK_S = 2.0  # for the weight node's own verdict to arrive
_TICK_S = 0.5


class Verdict(StrEnum):
    """What a canary showed."""

    UNKNOWN = "unknown"  # none has come back yet, or the node has no canary
    OK = "ok"
    BUSY = "busy"  # the node works, and had no room or no time for it
    FAILED = "failed"


_VERDICT = {
    pb.CANARY_OK: Verdict.OK,
    pb.CANARY_BUSY: Verdict.BUSY,
    pb.CANARY_FAILED: Verdict.FAILED,
}


class CanaryStub(Protocol):
    """The part of a weight node's stub that is needed."""

    async def Canary(self, request: pb.CanaryRequest, *, timeout: float) -> pb.CanaryReply: ...


class Canary:
    """Of one weight node. `run` lasts as long as its channel."""

    def __init__(
        self,
        node: str,
        *,
        interval_s: Callable[[], float],
        able: Callable[[], bool],
        changed: Callable[[], None],
    ) -> None:
        """`interval_s`: between two proofs, 0: no canaries; `able`: whether the node says that it can serve;
        `changed` is called when `failed` turns."""
        self.verdict = Verdict.UNKNOWN
        self.reason = ""
        self.duration_s: float | None = None  # of the last one that came back
        self.runs: Counter[Verdict] = Counter()
        self._node = node
        self._interval_s = interval_s
        self._able = able
        self._changed = changed
        self._due_s = 0.0  # monotonic

    @property
    def failed(self) -> bool:
        """True if the last one failed."""
        return self.verdict is Verdict.FAILED

    def proved(self) -> None:
        """Take a real token as a proof: one that took the attention nodes to compute."""
        self._note(Verdict.OK, "")

    async def run(self, stub: CanaryStub) -> NoReturn:
        """Ask whenever nothing else has proved anything for the interval."""
        while True:
            if not self._able():
                # It says itself that it cannot serve, and is asked anew once it can.
                self._due_s = 0.0
                self._forget()
            elif not self._interval_s():
                self._forget()
            elif time.monotonic() >= self._due_s:
                await self._ask(stub)
            await asyncio.sleep(_TICK_S)

    async def _ask(self, stub: CanaryStub) -> None:
        began_s = time.monotonic()
        try:
            reply = await stub.Canary(pb.CanaryRequest(timeout_s=TIMEOUT_S), timeout=TIMEOUT_S + _SLACK_S)
        except grpc.aio.AioRpcError as error:
            verdict, reason = verdict_of(error)
        else:
            verdict, reason = _VERDICT.get(reply.verdict, Verdict.UNKNOWN), reply.reason
            self.duration_s = time.monotonic() - began_s
        if self._able():
            self.runs[verdict] += 1
            self._note(verdict, reason)

    def _note(self, verdict: Verdict, reason: str) -> None:
        before, self.verdict, self.reason = self.verdict, verdict, reason
        self._due_s = time.monotonic() + (AGAIN_S if verdict is Verdict.FAILED else self._interval_s())
        if (before is Verdict.FAILED) == (verdict is Verdict.FAILED):
            return
        if verdict is Verdict.FAILED:
            log.warning("canary_failed", weight_node=self._node, reason=reason)
        else:
            log.info("canary_recovered", weight_node=self._node, verdict=verdict)
        self._changed()

    def _forget(self) -> None:
        failed, self.verdict, self.reason = self.failed, Verdict.UNKNOWN, ""
        if failed:
            self._changed()


def verdict_of(error: grpc.aio.AioRpcError) -> tuple[Verdict, str]:
    """What a canary showed whose call failed."""
    match error.code():
        case grpc.StatusCode.UNIMPLEMENTED:  # of an older version
            return Verdict.UNKNOWN, ""
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return Verdict.FAILED, f"no answer within {TIMEOUT_S:g} s"
        case grpc.StatusCode.UNAVAILABLE:
            return Verdict.FAILED, error.details() or "no connection"
        case code:
            return Verdict.UNKNOWN, f"{code.name}: {error.details()}"
