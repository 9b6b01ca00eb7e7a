"""The loop around the policy of `flume_common.autoscale`: look, decide, write the spec.

It acts only while `spec.autoscale` is on and not paused; a count that somebody sets by hand pauses it.
The count it writes compares the revision it was decided at, so a hand that is quicker wins.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import NoReturn, Protocol

import msgspec
import structlog
from flume_common.autoscale import Decision, FleetLoad, Settings, decide
from flume_common.election import Fenced
from flume_common.keys import Keys
from flume_common.membership import Member, Role, State
from flume_common.store import Put, Store, StoreError, mod_revision
from flume_protos.v1 import attention_pb2, weight_pb2

from flume_controller import desired
from flume_controller.desired import SpecError
from flume_controller.events import EventType, Happening
from flume_controller.happenings import FLEET
from flume_controller.load import Pace, Readings, node_loads, rest_s, waiting_tokens
from flume_controller.spec import Actor, AttentionSpec, encode

log = structlog.get_logger()

INTERVAL_S = 1.0


class LoadCalls(Protocol):
    """What it asks of nodes: None from one that does not answer in time."""

    async def stats(self, member: Member) -> attention_pb2.StatsReply | None: ...

    async def sequences(self, member: Member) -> list[weight_pb2.SequenceInfo] | None: ...


class MembersOf(Protocol):
    def of(self, role: Role) -> list[Member]: ...


class Autoscaler:
    """One per term of the leader."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        fenced: Fenced,
        members: MembersOf,
        nodes: LoadCalls,
        settings: Callable[[], Settings],
        *,
        prepare_s: Callable[[], float | None] = lambda: None,
        unready: Callable[[], Collection[str]] = tuple,
        tell: Callable[..., None] = lambda *happenings: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`settings` are asked for each time, `prepare_s` is what starts took of late.

        `unready`: attention nodes that say READY and do not count.
        """
        self._store = store
        self._keys = keys
        self._fenced = fenced
        self._members = members
        self._nodes = nodes
        self._settings = settings
        self._prepare_s = prepare_s
        self._unready = unready
        self._tell = tell
        self._clock = clock
        self._pace = Pace()
        self._readings = Readings()
        self._low_since_s: float | None = None
        self._failed = ""  # the last failure, logged once
        self._last_sequences: dict[str, list[weight_pb2.SequenceInfo]] = {}

    async def run(self) -> NoReturn:
        """Raises Deposed."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self.step()
                self._failed = ""
            except (StoreError, SpecError) as error:
                if str(error) != self._failed:
                    log.warning("autoscale_failed", error=str(error))
                self._failed = str(error)

    async def step(self) -> Decision | None:
        """One decision; None while it is off. Raises StoreError, InvalidSpec, Deposed."""
        spec, revision = await desired.read(self._store, self._keys)
        if spec is None or not spec.autoscale.active or spec.max < 1:
            self._low_since_s = None
            return None
        decision = decide(
            bounded(self._settings(), spec), await self._load(spec), self._low_since_s, self._clock()
        )
        self._low_since_s = decision.low_since_s
        if decision.desired != spec.desired:
            await self._set(spec, revision, decision)
        return decision

    async def _load(self, spec: AttentionSpec) -> FleetLoad:
        attention, weight = (_ready(self._members.of(role)) for role in (Role.ATTENTION, Role.WEIGHT))
        unready = self._unready()
        attention = [member for member in attention if member.id not in unready]
        replies = await asyncio.gather(*(self._nodes.stats(member) for member in attention))
        answered, sequences = await self._sequences(weight)
        stats = list(map(_or_last_word, attention, replies))
        readings = self._readings.look(stats)
        step_s = self._pace.step_s(answered, self._clock())
        return FleetLoad(
            nodes=node_loads(stats, sequences, readings),
            desired=spec.desired,
            changed_at_s=spec.updated_at_s,
            waiting_tokens=waiting_tokens(sequences),
            step_s=step_s,
            rest_s=rest_s(step_s, readings.values()),
            prepare_s=self._prepare_s(),
            gave_up=spec.set_by is Actor.CONTROLLER,
        )

    async def _sequences(
        self, weight: list[Member]
    ) -> tuple[list[weight_pb2.SequenceInfo], list[weight_pb2.SequenceInfo]]:
        """Those of nodes that answered, and those of all: a busy node that does not has its last ones."""
        lists = await asyncio.gather(*(self._nodes.sequences(member) for member in weight))
        now = {member.id: items for member, items in zip(weight, lists, strict=True) if items is not None}
        self._last_sequences = {
            member.id: now.get(member.id, self._last_sequences.get(member.id, [])) for member in weight
        }
        return (
            [item for items in now.values() for item in items],
            [item for items in self._last_sequences.values() for item in items],
        )

    async def _set(self, spec: AttentionSpec, revision: int, decision: Decision) -> None:
        after = msgspec.structs.replace(
            spec,
            desired=decision.desired,
            scale_deadline=None,
            set_by=Actor.AUTOSCALER,
            generation=spec.generation + 1,
            updated_at_s=self._clock(),
        )
        key = self._keys.spec_attention
        if (await self._fenced.txn([mod_revision(key, revision)], [Put(key, encode(after))])).succeeded:
            message = f"from {spec.desired} to {after.desired}: {decision.reason}"
            self._tell(Happening(FLEET, EventType.NORMAL, "Autoscaled", message))


def bounded(settings: Settings, spec: AttentionSpec) -> Settings:
    """The settings within all bounds that hold: the cluster's, the spec's and the autoscaler's own."""
    least = max(settings.min, spec.autoscale.min, spec.min)
    most = min(settings.max, spec.autoscale.max, spec.max)
    # Where they leave nothing between them, the upper ones count: they protect what there is to run on.
    most = max(most, 1)
    return replace(settings, min=min(least, most), max=most)


def _or_last_word(member: Member, reply: attention_pb2.StatsReply | None) -> attention_pb2.StatsReply:
    """What a silent node holds does not vanish from the load: its own record says what it was of late."""
    return reply or attention_pb2.StatsReply(
        node=member.id, capacity_tokens=member.kv_capacity_tokens, used_tokens=member.kv_used_tokens
    )


def _ready(members: list[Member]) -> list[Member]:
    return [member for member in members if member.state is State.READY]
