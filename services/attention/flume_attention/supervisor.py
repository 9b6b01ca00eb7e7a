"""The supervisor's half of a node: keeps an engine running, asks it, and knows how it is. No torch.

An engine that dies takes what it held with it; weight nodes notice by their lanes. The next one starts
with nothing, and they attach again.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

import structlog
from flume_common.backoff import Backoff
from flume_common.engine_death import cause_of
from flume_common.engine_link import PREPARE_S, Engine, LinkClosed, run_engine
from flume_common.engine_progress import Progress
from flume_common.membership import Registration, State
from flume_common.serving import Server
from flume_common.tasks import background

from flume_attention import messages as m
from flume_attention.errors import AttachRefused, ConfigRefused, EngineBusy, EngineGone
from flume_attention.startup import elapsed_ms

log = structlog.get_logger()
T = TypeVar("T")

ENGINE_MODULE = "flume_attention.engine"
# A thread that waits for the next parallel region must not take the core from the weight node.
ENGINE_ENV = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
ENGINE_SILENCE_S = 15.0
STABLE_S = 10.0
PUBLISH_INTERVAL_S = 0.5
ANSWER_S = 10.0
FRESH_S = 0.3  # whoever asks how a node is gives it half a second
ATTACH_S = 4.0
"""Less than a weight node waits, so that it hears why there is no lane yet. It asks again."""
LONG_MS = 1000


class Supervisor:
    """`keep_engine` and `publish` run for as long as the node does."""

    def __init__(
        self, args: Sequence[str], *, zygote: str | None = None, silence_s: float = ENGINE_SILENCE_S
    ) -> None:
        """`silence_s`: an engine that makes no progress for so long is replaced."""
        self.engine_deaths = 0
        self.last_engine_error = ""
        self.last_engine_death_s = 0.0  # Unix time
        self.draining = False
        self.leave_by_s = 0.0  # Unix time; as in Member
        self.report = m.Report()  # the newest of this engine
        self._args = args
        self._zygote = zygote
        self._silence_s = silence_s
        self._engine: Engine[m.FromEngine] | None = None
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._requests = itertools.count(1)
        self._changed = asyncio.Event()
        self._urgent = asyncio.Event()  # changed in a way that others should see at once
        self._up = asyncio.Event()
        self._preparing: dict[int, float] = {}  # requests whose answer takes a while, and since when
        self._prepared = asyncio.Event()  # there are none
        self._prepared.set()

    @property
    def state(self) -> State:
        if self._engine is None:
            return State.PREPARING
        return State.DRAINING if self.draining else State.READY

    @property
    def engine_pid(self) -> int | None:
        return self._engine.pid if self._engine else None

    @property
    def progress(self) -> Progress | None:
        """What the engine is doing, which is never asked for it; None without an engine."""
        return self._engine.progress if self._engine else None

    async def wait_up(self) -> None:
        """Until an engine runs."""
        await self._up.wait()

    async def keep_engine(self) -> NoReturn:
        """Run an engine; when it dies, run another. Raises ConfigRefused when it says that none can run."""
        backoff = Backoff(cap_s=5.0)
        while True:
            started_at = time.monotonic()
            async with run_engine(
                ENGINE_MODULE, self._args, inbox=m.FromEngine, env=ENGINE_ENV, zygote=self._zygote
            ) as engine:
                try:
                    await self._run(engine, started_at)
                except LinkClosed as error:
                    log.error("engine_lost", engine_pid=engine.pid, reason=str(error))
                finally:
                    held = self.report.used_tokens
                    self._lose_engine()
            self._note_death(engine, held)
            if time.monotonic() - started_at >= STABLE_S:
                backoff.reset()
            await asyncio.sleep(backoff.next_s())

    def _note_death(self, engine: Engine[m.FromEngine], held_tokens: int) -> None:
        returncode = engine.process.returncode
        cause = cause_of(returncode, silent=engine.killed_because)
        self.engine_deaths += 1
        self.last_engine_error = f"{cause}; {held_tokens} tokens of KV are lost"
        self.last_engine_death_s = time.time()
        self._changed.set()
        log.error("engine_ended", exit_code=returncode, cause=cause, deaths=self.engine_deaths)

    async def _run(self, engine: Engine[m.FromEngine], asked_at: float) -> NoReturn:
        async with background(watch=engine.watch(self._patience_s)):
            await self._serve(engine, asked_at)

    async def _serve(self, engine: Engine[m.FromEngine], asked_at: float) -> NoReturn:
        started = await engine.receive()
        if isinstance(started, m.CannotRun):
            raise ConfigRefused(started.reason)
        assert isinstance(started, m.Started), started
        # The first phase ends with all imported, whether in a fork of the zygote or anew.
        phases = {"process": 1e3 * (started.main_at_s - asked_at), **started.phases_ms}
        log.info(
            "engine_started", engine_pid=engine.pid, elapsed_ms=round(1e3 * (time.monotonic() - asked_at)),
            **{f"{name}_ms": round(took_ms) for name, took_ms in phases.items()},
        )  # fmt: skip
        self._engine = engine
        self._up.set()
        if self.draining:
            engine.send(self._set_draining(0))
        self._urgent.set()
        self._changed.set()
        while True:
            self._take(await engine.receive())

    def _patience_s(self) -> float:
        return max(self._silence_s, PREPARE_S) if self._preparing else self._silence_s

    def _lose_engine(self) -> None:
        self._engine = None
        self._preparing.clear()
        self._prepared.set()
        self._up.clear()
        self.report = m.Report()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EngineGone("the engine ended"))
        self._urgent.set()
        self._changed.set()

    def _take(self, message: m.FromEngine) -> None:
        match message:
            case m.LaneClosed():
                log.info("lane_closed", weight_node=message.weight_node, reason=message.reason)
            case m.StepNotTaken():
                log.warning(
                    "step_refused", weight_node=message.weight_node, step=message.step,
                    refusal=message.refusal, detail=message.detail,
                )  # fmt: skip
            case m.Report():
                self._take_report(message)
            case m.Preparing():
                self._preparing[message.for_request] = time.monotonic()
                self._prepared.clear()
                return
        number = getattr(message, "request", 0)
        self._note_prepared(number)
        answer = self._answers.get(number)
        if answer is not None and not answer.done():
            answer.set_result(message)

    def _note_prepared(self, number: int) -> None:
        if (since_s := self._preparing.pop(number, None)) is None:
            return
        elapsed_ms = round(1e3 * (time.monotonic() - since_s))
        if elapsed_ms >= LONG_MS:
            log.info("lane_prepared", elapsed_ms=elapsed_ms)
        if not self._preparing:
            self._prepared.set()

    def _take_report(self, report: m.Report) -> None:
        if report.capacity_blocks != self.report.capacity_blocks:
            self._urgent.set()  # nobody places a tail here before they know how much fits
        self.report = report
        self._changed.set()

    async def attach(self, make: Callable[[int], m.Attach]) -> m.Attached:
        """As `ask`. Raises EngineBusy where it takes longer than a weight node waits though the engine works:
        it goes on, and whoever asks again finds what was compiled meanwhile.
        """
        try:
            async with asyncio.timeout(ATTACH_S):
                await self._prepared.wait()
                return await self.ask(make, m.Attached)
        except TimeoutError as error:
            if self._preparing:
                log.warning("lane_takes_long", reason="kernels for this layout are being compiled")
                raise EngineBusy("kernels for this layout are being compiled, once; ask again") from error
            if self._engine is not None and self._engine.progress.quiet_s < ATTACH_S:
                raise EngineBusy("the engine answers long steps; ask again") from error
            raise EngineGone(f"the engine did not answer within {ATTACH_S:g} s") from error

    async def ask(
        self,
        make: Callable[[int], object],
        kind: type[T],
        *,
        timeout_s: float = ANSWER_S,
        give_up: Callable[[int], object] | None = None,
    ) -> T:
        """Send the engine a request, made with its number, and wait for the answer.

        `give_up` is sent when nobody waits any more. Raises EngineGone, and AttachRefused when the engine
        refuses.
        """
        if self._engine is None:
            raise EngineGone("the engine is not up yet")
        number = next(self._requests)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            self._engine.send(make(number))
            async with asyncio.timeout(timeout_s):
                message = await answer
        except LinkClosed as error:
            raise EngineGone(str(error)) from error
        except TimeoutError as error:
            raise EngineGone(f"the engine did not answer within {timeout_s:.0f} s") from error
        finally:
            del self._answers[number]
            if give_up is not None and (answer.cancelled() or not answer.done()):
                self.tell(give_up(number))
        if isinstance(message, m.Refused):
            raise AttachRefused(message.field, message.detail)
        assert isinstance(message, kind), message
        return message

    def tell(self, message: object) -> None:
        """Send the engine what is not answered, if there is one."""
        with suppress(LinkClosed):  # then there is nobody to tell
            if self._engine is not None:
                self._engine.send(message)

    async def fresh_report(self) -> m.Report:
        """How the engine is now, or was when it last said: a long step does not hold this up."""
        try:
            async with asyncio.timeout(FRESH_S):
                return await self.ask(lambda number: m.Ask(request=number), m.Report)
        except (EngineGone, TimeoutError):
            return self.report

    async def set_draining(self, draining: bool, *, leave_by_s: float = 0.0) -> None:
        """Takes effect at once, and again in every engine to come. `leave_by_s` as in Member."""
        self.draining, self.leave_by_s = draining, leave_by_s
        self._urgent.set()
        self._changed.set()
        try:
            await self.ask(self._set_draining, m.Report)
        except EngineGone as error:
            log.warning("drain_not_told", draining=draining, reason=str(error))

    def _set_draining(self, number: int) -> m.SetDraining:
        return m.SetDraining(request=number, draining=self.draining)

    async def publish(self, registration: Registration, server: Server) -> NoReturn:
        """Keep the health service and our member in etcd true: states at once, counts every now and then."""
        while True:
            self._urgent.clear()
            self._changed.clear()
            server.set_ready(self.state is State.READY)
            if registration.member.state is not self.state:
                log.info("state", state=self.state, elapsed_ms=elapsed_ms())
            await registration.update(
                state=self.state,
                leave_by_s=self.leave_by_s,
                engine_deaths=self.engine_deaths,
                last_engine_error=self.last_engine_error,
                last_engine_death_s=self.last_engine_death_s,
                kv_capacity_tokens=self.report.capacity_tokens,
                kv_used_tokens=self.report.used_tokens,
                sequences=sum(lane.sequences for lane in self.report.lanes),
            )
            try:
                async with asyncio.timeout(PUBLISH_INTERVAL_S):
                    await self._urgent.wait()
            except TimeoutError:
                await self._changed.wait()
