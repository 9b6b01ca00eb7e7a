"""Run a canary: two tokens of a sequence of its own, the second of which asks an attention node.

All who ask at the same time share one. Two tokens that do not come in time mean little by themselves: a step
may be long, or others may have the memory. Only an engine that had nothing else to do has failed.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import NamedTuple, Protocol

from flume_common.engine_progress import Activity, Progress
from flume_protos.v1 import weight_pb2 as pb

from flume_weight import messages as m
from flume_weight.errors import RequestRefused
from flume_weight.sampling import SamplingParams
from flume_weight.streams import Streams

TIMEOUT_S = 10.0
PROMPT = [1, 2, 3]
"""Any tokens do: what comes of them is not looked at. Every vocabulary has these."""
TOKENS = 2
_BUSY = "RESOURCE_EXHAUSTED"


class Outcome(NamedTuple):
    """What a canary showed."""

    verdict: pb.CanaryVerdict
    reason: str = ""
    elapsed_s: float = 0.0


class Host(Protocol):
    """The part of the supervisor that is needed."""

    streams: Streams

    @property
    def progress(self) -> Progress | None: ...

    def submit(self, message: m.Submit) -> None:
        """Raises RequestRefused."""

    def cancel(self, sequence: str) -> None: ...


class CanaryRunner:
    """One per weight node."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._numbers = itertools.count(1)
        self._running: asyncio.Task[Outcome] | None = None

    async def run(self, timeout_s: float = 0.0) -> Outcome:
        """Wait for what a canary shows: the one under way, or a new one. 0: as long as one usually may."""
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run(min(timeout_s or TIMEOUT_S, TIMEOUT_S)))
        return await asyncio.shield(self._running)

    async def _run(self, timeout_s: float) -> Outcome:
        began_s = time.monotonic()
        verdict, reason = await self._outcome(timeout_s)
        return Outcome(verdict, reason, time.monotonic() - began_s)

    async def _outcome(self, timeout_s: float) -> tuple[pb.CanaryVerdict, str]:
        name = f"canary-{next(self._numbers)}"
        sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        before = self._host.progress
        try:
            with self._host.streams.listen(name) as events:
                self._host.submit(m.Submit(name, PROMPT, sampling, canary=True))
                try:
                    async with asyncio.timeout(timeout_s):
                        while isinstance(event := await events.get(), m.Token):
                            pass
                except TimeoutError:
                    self._host.cancel(name)
                    return too_late(before, self._host.progress, timeout_s)
                except asyncio.CancelledError:
                    self._host.cancel(name)
                    raise
        except RequestRefused as refused:
            return pb.CANARY_FAILED, str(refused)
        if isinstance(event, m.Failed):
            return (pb.CANARY_BUSY if event.code == _BUSY else pb.CANARY_FAILED), event.message
        return pb.CANARY_OK, ""


def too_late(
    before: Progress | None, after: Progress | None, timeout_s: float
) -> tuple[pb.CanaryVerdict, str]:
    """Judge a canary that did not come back in time by what the engine was at before and after. Pure."""
    late = f"no second token within {timeout_s:g} s"
    if before is None or after is None:
        return pb.CANARY_FAILED, f"{late}: there is no engine"
    if after.awaited:
        return pb.CANARY_FAILED, f"{late}: a step waits for an attention node"
    if after.quiet_s >= timeout_s:
        return pb.CANARY_FAILED, f"{late}: the engine makes no progress"
    if after.activity is Activity.STEPPING or after.step > before.step + TOKENS:
        return pb.CANARY_BUSY, f"{late}: the engine is in step {after.step}"
    if after.activity is Activity.PREPARING:
        return pb.CANARY_BUSY, f"{late}: the engine prepares what later steps need"
    return pb.CANARY_FAILED, f"{late}: the engine is idle"
