"""The weight node's supervisor: asyncio, never torch. It keeps the engine, the lanes and the listing.

An engine that dies is started again; streams that it carried end with UNAVAILABLE, which the router
retries elsewhere if nothing was sent yet.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, NoReturn

import msgspec
import structlog
from flume_common.config_watch import LiveConfig
from flume_common.engine_death import cause_of
from flume_common.engine_link import Engine, LinkClosed, run_engine
from flume_common.engine_progress import Activity, Progress
from flume_common.failures import Failure
from flume_common.membership import Life, Members, Registration, Role, State
from flume_common.model_source import ModelSource
from flume_common.reasons import Reason
from flume_common.route_store import RouteWriter
from flume_common.routes import Route, TokenRange
from flume_common.tasks import background

from flume_weight import messages as m
from flume_weight.attachments import Attachments, detach
from flume_weight.canary import CanaryRunner
from flume_weight.config import engine_args
from flume_weight.errors import ConfigRefused, RequestRefused
from flume_weight.identity import Identity
from flume_weight.last_step import EngineDeath
from flume_weight.range_mover import move_ranges
from flume_weight.sequence_views import SequenceViews
from flume_weight.serving_state import Serving, ServingState
from flume_weight.settings import configure
from flume_weight.streams import Streams

log = structlog.get_logger()

_RECONCILE_EVERY_S = 1.0  # also on every change of membership or of a lane
_RESTART_S = (0.2, 1.0, 5.0)
# Threads that wait for work must sleep: nodes share the cores of a small machine.
_ENGINE_ENV = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


class Supervisor:
    """Owns one engine at a time; `run` keeps it alive until cancelled."""

    def __init__(
        self,
        args: argparse.Namespace,
        source: ModelSource,
        members: Members,
        config: LiveConfig,
        secret: bytes = b"",
    ) -> None:
        self.node: str = args.node
        self.model_name: str = args.model_name or source.name
        self.streams = Streams()
        self.sequences = SequenceViews()
        self.ready: m.Ready | None = None
        self.capacity_tokens = 0
        self.running = self.waiting = 0  # sequences of this engine
        self.recomputed = m.Recomputed()  # of this engine
        self.epoch_rejected = self.logit_rows_read = 0  # of this engine
        self.step_model: m.StepModel | None = None  # of this engine, on a GPU
        self.engine_deaths = 0
        self.failed: Counter[str] = Counter()  # requests, by Failure or the name of a gRPC status
        self._last_step: list[str] = []  # sequences of this engine's
        self._last_words: m.EngineFailed | None = None
        self._last_engine_error = self._last_model_failure = ""
        self._last_engine_death_s = 0.0
        self.canary = CanaryRunner(self)
        self.started = asyncio.Event()  # the first engine is ready
        self.serving = Serving(State.PREPARING, Reason.LOADING)
        self._args = args
        self._model_path = str(source.path)
        self._members = members
        self._config = config
        self._registration: Registration
        self._routes: RouteWriter
        self._engine: Engine[Any] | None = None
        self._attachments: Attachments | None = None
        self._to_move: asyncio.Queue[m.MoveRanges] = asyncio.Queue()
        self._serving_state = ServingState()
        self._said: dict[str, Any] = {}  # of ourselves, as a member
        self._poked = asyncio.Event()
        self._secret = secret
        self._life = Life(0, 0)

    @property
    def lanes(self) -> int:
        """Attention nodes we are attached to."""
        attachments = self._attachments
        return len(attachments.up) if attachments else 0

    @property
    def epoch(self) -> int:
        """Our fencing number; 0 before the first engine was told."""
        return self._life.epoch

    @property
    def progress(self) -> Progress | None:
        """What the engine is doing, which is never asked for it; None without an engine."""
        return self._engine.progress if self._engine else None

    @property
    def working(self) -> bool:
        """True while a READY engine makes progress, however long its step lasts."""
        progress = self.progress
        return self.ready is not None and progress is not None and progress.quiet_s < self._silence_s()

    async def run(self, registration: Registration, routes: RouteWriter) -> NoReturn:
        """Keep an engine running. Raises ConfigRefused when it says that it cannot start."""
        self._registration, self._routes = registration, routes
        failures = 0
        while True:
            started_s = time.monotonic()
            died = False
            try:
                await self._run_engine_once()
            except LinkClosed:
                died = True
            finally:
                await self._engine_gone(died)
            failures = 0 if time.monotonic() - started_s > 60 else failures + 1
            delay_s = _RESTART_S[min(failures, len(_RESTART_S)) - 1] if failures else 0
            log.info("engine_restart", delay_s=delay_s)
            await asyncio.sleep(delay_s)

    def submit(self, message: m.Submit) -> None:
        """Raises RequestRefused when there is no engine to take it."""
        self._send_to_engine(message)
        if not message.canary:
            self.sequences.submitted(message, time.monotonic())

    async def kept(self, sequence: str, lost_node: str) -> list[m.KeptRange]:
        """What the attention nodes keep of a sequence whose weight node is lost, for us to take now."""
        if self._attachments is None:
            return []
        return await self._attachments.kept(sequence, lost_node, self._members)

    @asynccontextmanager
    async def detaching(self, registration: Registration) -> AsyncIterator[None]:
        """At the end, nobody takes over what this node held: the attention nodes free it at once."""
        yield
        await detach(self._members.of(Role.ATTENTION), self._identity_of(registration))

    def _identity_of(self, registration: Registration) -> Identity:
        return Identity(self.node, registration.life, self._secret, registration.registered)

    def _identity(self) -> Identity:
        return self._identity_of(self._registration)

    def cancel(self, sequence: str) -> None:
        with suppress(RequestRefused):
            self._send_to_engine(m.Cancel(sequence))

    def _send_to_engine(self, message: object) -> None:
        if self._engine is None or self.ready is None:
            raise RequestRefused("UNAVAILABLE", f"weight node {self._args.node} is loading its model")
        try:
            self._engine.send(message)
        except LinkClosed as error:
            raise RequestRefused("UNAVAILABLE", f"weight node {self._args.node}: {error}") from error

    # -- one engine ------------------------------------------------------------------------------

    async def _run_engine_once(self) -> None:
        args = engine_args(self._args, self._model_path)
        started_s = time.monotonic()
        # Only a module string crosses over: importing the engine here would import torch.
        async with run_engine(
            "flume_weight.engine_process", args, inbox=m.Outbound, env=_ENGINE_ENV
        ) as engine:
            self._engine = engine
            async with background(watch=engine.watch(self._silence_s)):
                await self._serve_engine(engine, started_s)

    async def _serve_engine(self, engine: Engine[Any], started_s: float) -> NoReturn:
        self.ready = ready = await self._await_ready(engine)
        log.info("engine_ready", pid=engine.pid, load_s=round(ready.load_s, 2),
                 elapsed_s=round(time.monotonic() - started_s, 2))  # fmt: skip
        self._life = Life(0, 0)
        self._attachments = Attachments(ready, engine.send, self._identity)
        await self._publish()
        self.started.set()
        self._to_move = asyncio.Queue()
        async with background(
            keep_lanes=self._keep_lanes(),
            settings=self._follow_settings(engine, ready),
            move_ranges=move_ranges(self._to_move, self._members, self._identity, engine.send),
        ):
            while True:
                await self._hear(await engine.receive())

    async def _await_ready(self, engine: Engine[Any]) -> m.Ready:
        while True:
            match await engine.receive():
                case m.Ready() as ready:
                    return ready
                case m.Refused(message=message):
                    raise ConfigRefused(message)
                case m.Loading(bytes_done=done, bytes_total=total):
                    log.info("model_loading", percent=round(100 * done / max(total, 1)))

    async def _engine_gone(self, died: bool) -> None:
        """Forget the engine, end its streams. `died`: by itself, or because it hung."""
        death = self._death()
        failed = self.streams.fail_all(death.failed)
        if died:
            self._note_death(death, failed)
        if self._attachments is not None:
            self._attachments.close()
        self._engine = self.ready = self._attachments = None
        self.capacity_tokens = self.running = self.waiting = 0
        self.recomputed, self.step_model = m.Recomputed(), None
        self.epoch_rejected = self.logit_rows_read = 0
        self.sequences.clear()
        self._routes.end_all()  # or they would be written again after a lost lease
        await self._publish()

    def _death(self) -> EngineDeath:
        engine, words, step = self._engine, self._last_words, self._last_step
        self._last_words, self._last_step = None, []
        if engine is None:
            return EngineDeath(self.node, "it did not start", frozenset(), by_exception=False)
        if words is None and engine.progress.activity is not Activity.STEPPING:
            step = []
        return EngineDeath(
            self.node,
            cause_of(
                engine.process.returncode, words=words.error if words else "", silent=engine.killed_because
            ),
            frozenset(words.sequences if words else step),
            by_exception=words is not None,
        )

    def _note_death(self, death: EngineDeath, failed: Sequence[m.Failed]) -> None:
        self.engine_deaths += 1
        ended = sum(event.code == "INTERNAL" for event in failed)
        for event in failed:
            self.failed[event.failure if event.code == "INTERNAL" and event.failure else "engine_lost"] += 1
        self._last_engine_error = (
            f"{death.cause}; {len(failed) - ended} requests go on elsewhere, {ended} failed"
        )
        self._last_engine_death_s = time.time()
        log.error("engine_died", cause=death.cause, in_step=sorted(death.in_step),
                  requests=len(failed), requests_failed=ended, deaths=self.engine_deaths)  # fmt: skip

    def _note_failure(self, failed: m.Failed) -> None:
        self.failed[failed.failure.value if failed.failure else failed.code.lower()] += 1
        if failed.failure is not None:
            log.error(
                "request_failed", sequence=failed.sequence, failure=failed.failure, detail=failed.message
            )
        if failed.failure is Failure.MODEL_OUTPUT_INVALID:
            self._last_model_failure = f"request {failed.sequence}: {failed.message}"

    async def _publish(self) -> None:
        """Keep our member true: READY only while there is a lane by which we can serve."""
        attachments = self._attachments
        before, self.serving = (
            self.serving,
            self._serving_state.look(
                time.monotonic(),
                engine_ready=self.ready is not None,
                lanes=attachments.up if attachments else (),
                draining=attachments.up_draining if attachments else (),
                capacity_tokens=self.capacity_tokens,
            ),
        )
        if self.serving != before:
            log.info("state", state=self.serving.state, reason=self.serving.reason)
        said: dict[str, Any] = {
            "state": self.serving.state,
            "reason": self.serving.reason,
            "lanes": tuple(attachments.up) if attachments else None,
            "kv_capacity_tokens": self.capacity_tokens,
            "sequences": self.running + self.waiting,
            "engine_deaths": self.engine_deaths,
            "last_engine_error": self._last_engine_error,
            "last_engine_death_s": self._last_engine_death_s,
            # Written at the latest by the next look at lanes, so many failures are one write.
            "model_failures": self.failed[Failure.MODEL_OUTPUT_INVALID],
            "last_model_failure": self._last_model_failure,
        }
        if self.ready is not None:
            said["context_tokens"] = self.ready.context_tokens
        if said != self._said:
            self._said = said
            await self._registration.update(**said)

    def _silence_s(self) -> float:
        """How long an engine may make no progress. A wait for an attention node is said in its page."""
        flag_s: float = self._args.engine_silence_s
        return flag_s

    async def _keep_lanes(self) -> NoReturn:
        """Level-triggered: wake-ups carry no facts."""
        async with background(poke_on_change=self._poke_on_change()):
            while True:
                self._poked.clear()
                if self._attachments is not None and self._engine is not None:
                    if self._registration.life != self._life:
                        self._life = self._registration.life
                        self._engine.send(m.Epoch(self._identity().lane_epoch))
                    await self._attachments.reconcile(self._members.of(Role.ATTENTION))
                    await self._publish()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_RECONCILE_EVERY_S):
                        await self._poked.wait()

    async def _follow_settings(self, engine: Engine[Any], ready: m.Ready) -> NoReturn:
        version = -1
        while True:
            version = await self._config.wait_newer(version)
            with suppress(LinkClosed):  # whoever receives hears of it, too
                engine.send(configure(self._config.current, ready))

    async def _poke_on_change(self) -> NoReturn:
        while True:
            await self._members.changed()
            self._poked.set()

    # -- what the engine says --------------------------------------------------------------------

    async def _hear(self, message: Any) -> None:
        match message:
            case m.Produced(tokens=tokens):
                self.sequences.produced(tokens)
                for token in tokens:
                    self.streams.deal(token)
            case m.Finished() | m.Failed():
                if isinstance(message, m.Failed):
                    self._note_failure(message)
                self.sequences.ended(message.sequence)
                self.streams.deal(message)
            case m.StepSequences(sequences=names):
                self._last_step = names
            case m.EngineFailed():
                self._last_words = message
            case m.RouteChanged(sequence=sequence, ranges=ranges):
                self.sequences.routed(sequence, ranges)
                self._write_route(sequence, ranges)
            case m.Sequences(sequences=states):
                self.sequences.reported(states)
            case m.Capacity(capacity_tokens=capacity, running=running, waiting=waiting):
                self.capacity_tokens, self.running, self.waiting = capacity, running, waiting
                await self._publish()
            case m.LaneOpen():
                if self._attachments is not None:
                    self._attachments.opened(message)
            case m.LaneUp(node=node, hop=hop, reason=reason):
                log.info("lane_up", attention_node=node, hop=hop)
                if reason:
                    log.warning("region_not_mapped", attention_node=node, reason=reason)
            case m.MoveRanges():
                self._to_move.put_nowait(message)
            case m.EpochRejected(messages=messages):
                self.epoch_rejected = messages
                log.warning("stale_messages_ignored", messages=messages)
            case m.LogitRowsRead(rows=rows):
                self.logit_rows_read = rows
            case m.Recomputed():
                self.recomputed = message
            case m.StepModel():
                self._note_model(message)
            case m.Contained(event=event, traceback=text):
                log.error(event, sequences=message.sequences, attention_node=message.attention_node or None,
                          exception=text)  # fmt: skip
            case m.Adopted(sequence=sequence, tokens=tokens):
                log.info("sequence_adopted", sequence=sequence, adopted_tokens=tokens)
            case m.Recovered():
                log.info(
                    "recovery_done", sequence=message.sequence, cause=message.cause,
                    recomputed_tokens=message.recomputed_tokens, elapsed_s=round(message.elapsed_s, 3),
                )  # fmt: skip
            case m.NodeSilent(node=node, sequences=waiting):
                log.warning("attention_node_silent", attention_node=node, sequences_waiting=waiting)
            case m.LaneLost(node=node, reason=reason, sequences=affected, lost_tokens=lost):
                log.warning(
                    "lane_lost", attention_node=node, reason=reason, sequences=affected, lost_tokens=lost,
                    **self._recomputed_fields(),
                )  # fmt: skip
                if self._attachments is not None and not message.replaced:
                    self._attachments.lost(node)
                self._poked.set()

    def _note_model(self, model: m.StepModel) -> None:
        before, self.step_model = self.step_model, model
        if before is None or model.comparisons != before.comparisons:
            log.info(
                "step_model", microbatches=model.microbatches, comparisons=model.comparisons,
                error_ratio=round(model.error_ratio, 3), bias_ratio=round(model.bias_ratio, 3),
            )  # fmt: skip

    def _recomputed_fields(self) -> dict[str, int]:
        totals = msgspec.structs.asdict(self.recomputed)
        return {f"recomputed_{cause}_tokens": tokens for cause, tokens in totals.items()}

    def _write_route(self, sequence: str, ranges: list[m.RangeInfo]) -> None:
        if not ranges:
            self._routes.end(sequence)
            return
        items = tuple(TokenRange(item.start, item.end, item.node) for item in ranges)
        self._routes.put(Route(sequence, self._args.node, self._registration.epoch, items))
