"""One reconcile pass over the attention nodes: read all of the state, plan, act, report.

Decisions are in `plan.py`, `observe.py`, `progress.py` and `status.py`; when to run a pass is in
`reconcile.py`. A pass belongs to one term of the leader: etcd refuses its writes once that is over, and
what etcd can't refuse is not begun then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import grpc
import msgspec
import structlog
from flume_common.election import Fenced
from flume_common.keys import Keys
from flume_common.membership import Member, Role, State
from flume_common.reasons import Reason
from flume_common.store import Get, KeyValue, Put, Store, mod_revision

from flume_controller import desired, happenings
from flume_controller.desired import InvalidSpec
from flume_controller.events import Happening
from flume_controller.last_known import LastKnown
from flume_controller.leaving import with_deadline
from flume_controller.memory import Memory
from flume_controller.nodes import Nodes
from flume_controller.observe import Patience, free_ids, observe
from flume_controller.plan import Action, Drain, NodeView, Phase, Start, Stop, Undrain, plan
from flume_controller.progress import Progress, progress, returned
from flume_controller.providers.base import Instance, Provider
from flume_controller.reach import Answer, Evidence
from flume_controller.salvage import salvaged
from flume_controller.spec import AttentionSpec, AttentionStatus, decode_spec, decode_status, encode
from flume_controller.status import Service, WeightView, report

log = structlog.get_logger()

LEAVING_POLL_S = 0.3
"""That a draining node has become empty is seen only by asking it."""

SETTLE_S = 12.0
"""Longer than a lease of 10 s: what a new incarnation came with and nobody renews is gone by then."""

LEAST_DEADLINE_S = 0.001
"""0 would be none."""

Members = Mapping[str, Member]


class ActionsFailed(Exception):
    """Some actions of a pass failed; the others were done."""

    def __init__(self, failures: Sequence[str]) -> None:
        super().__init__("; ".join(failures))
        self.failures = tuple(failures)


class SpecMoved(Exception):
    """Somebody wrote the spec while a pass was about to; the next pass decides anew."""

    def __init__(self) -> None:
        super().__init__("the spec changed during the pass")


class AttentionFleet:
    """Makes the attention nodes match the spec, one pass at a time. One object per term."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        fenced: Fenced,
        provider: Provider,
        nodes: Nodes,
        initial: AttentionSpec,
        *,
        leader: str = "",
        tell: Callable[..., None] = lambda *happenings: None,
        patience: Patience | None = None,
        progress_deadline_s: float = 600.0,
        preferred_ids: Sequence[str] = (),
        disk_full: Callable[[], str] = str,
        last_known: LastKnown | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`tell` takes what happened, for the events; `leader` is the id that the status names.

        `disk_full` says which disk is, empty for none.
        """
        self._store = store
        self._keys = keys
        self._fenced = fenced
        self._provider = provider
        self._nodes = nodes
        self._initial = initial
        self._leader = leader
        self._tell = tell
        self._patience = patience or Patience()
        self._progress_deadline_s = progress_deadline_s
        self._preferred_ids = preferred_ids
        self._disk_full = disk_full
        self._clock = clock
        self._last_known = last_known
        self._memory = Memory()
        self._unreadable: dict[str, int] = {}  # member keys, at the revision that was logged
        self.unready: frozenset[str] = frozenset()
        """Attention nodes that say READY and did not count in the last pass."""

    @property
    def prepare_s(self) -> float | None:
        """How long nodes took of late from their start to READY; None before the first."""
        return self._memory.prepare_s

    async def reconcile(self) -> float | None:
        """One pass; seconds after which it wants another.

        A spec that can't be read changes nothing: the nodes are kept as the last one wanted them.
        Raises StoreError, ActionsFailed, SpecMoved, Deposed.
        """
        previous = await self._previous()
        spec, revision, invalid = await self._spec(previous)
        members, weights, routers = await self._members()
        answers = await self._nodes.answers(_worth_asking(weights.values()))
        instances = await self._instances(members)
        views = await self._observe(spec, members, instances, Evidence.of(weights.values(), answers))
        ready = sum(view.phase is Phase.READY for view in views)
        state = progress(spec, ready, previous, self._clock(), self._progress_deadline_s)
        if not invalid:
            spec, state = await self._give_up(spec, revision, state, previous)
        if ready >= spec.desired:
            self._memory.all_ready(self._clock())
        failures = await self._act(self._prudent(plan(spec.desired, views)), spec, members)
        service = Service(weight_views(weights.values(), answers), failed_canaries(routers.values()))
        status = report(
            spec, views, self._memory.crashes, failures, state, previous, self._clock(),
            service=service, invalid=invalid, disk_full=self._disk_full(),
        )  # fmt: skip
        self.unready = frozenset(status.unready)
        await self._write(status, previous)
        self._tell(*self._news(spec, views, previous, status))
        if failures:
            raise ActionsFailed(failures)
        return self._wish_s(spec, views)

    async def _spec(self, previous: AttentionStatus | None) -> tuple[AttentionSpec, int, str]:
        """The spec and its revision, created where there is none yet; and why it is not the one in etcd."""
        try:
            spec, revision = await desired.read(self._store, self._keys)
        except InvalidSpec as error:
            spec = self._memory.last_spec or salvaged(error.value, previous, await self._num_running())
            return spec, error.revision, str(error)
        if spec is not None:
            self._memory.last_spec = spec
            await self._announce(spec, restored=False)
            return spec, revision, ""
        key = self._keys.spec_attention
        spec = self._first_spec()
        settings = await self._last_known.lost_settings() if self._last_known else []
        result = await self._fenced.txn(
            [mod_revision(key, 0), *(mod_revision(put.key, 0) for put in settings)],
            [Put(key, encode(spec)), *settings],
        )
        if not result.succeeded:
            raise SpecMoved
        await self._announce(spec, restored=spec.generation > self._initial.generation)
        return spec, result.revision, ""

    def _first_spec(self) -> AttentionSpec:
        """That there is none is no wish: one that was lost is written again, and settings with it."""
        last = self._memory.last_spec or self._known_spec()
        return msgspec.structs.replace(last, generation=last.generation + 1) if last else self._initial

    def _known_spec(self) -> AttentionSpec | None:
        """As an earlier leader left it, and this controller saw it."""
        value = self._last_known.spec if self._last_known else None
        try:
            return decode_spec(value) if value else None
        except (ValueError, RecursionError):
            return None

    async def _announce(self, spec: AttentionSpec, *, restored: bool) -> None:
        """Tell people, once, when etcd is another one than before. Raises Deposed, StoreError.

        A term of the former incarnation may not have heard that it is over, and its events go nowhere.
        """
        if self._last_known is None or not self._last_known.has_news:
            return
        await self._fenced.txn([], [Get(self._keys.spec_attention)])
        if self._last_known.announce():
            reason = self._last_known.incarnation.record.reason
            self._tell(happenings.of_store_replaced(reason, spec, restored=restored))

    async def _num_running(self) -> int:
        return sum(item.running and not item.stopping for item in await self._provider.instances())

    async def _previous(self) -> AttentionStatus | None:
        found = await self._store.get(self._keys.status_attention)
        return _status_or_none(found.value) if found else None

    async def _give_up(
        self, spec: AttentionSpec, revision: int, state: Progress, previous: AttentionStatus | None
    ) -> tuple[AttentionSpec, Progress]:
        """Return to the last good count where a scale-up can't complete. Raises SpecMoved."""
        back = returned(spec, state, self._clock())
        if back is None or previous is None:
            return spec, state
        after, gave_up = back
        noted = msgspec.structs.replace(previous, gave_up=gave_up)
        result = await self._fenced.txn(
            [mod_revision(self._keys.spec_attention, revision)],
            # Together, so that a death between the two does not forget why.
            [
                Put(self._keys.spec_attention, encode(after)),
                Put(self._keys.status_attention, encode(noted)),
            ],
        )
        if not result.succeeded:
            raise SpecMoved
        self._tell(happenings.of_giving_up(gave_up, self._progress_deadline_s))
        return after, replace(state, gave_up=gave_up, overdue=False, at_s=self._clock())

    async def _members(self) -> tuple[Members, Members, Members]:
        """Attention nodes, weight nodes and routers, by id."""
        # Read, not taken from a cached view: nothing is stopped on the strength of what was true once.
        found = await self._store.range(self._keys.members)
        members = [m for kv in found.items.values() if (m := self._member_or_none(kv)) is not None]
        attention, weights, routers = (
            {member.id: member for member in members if member.role is role}
            for role in (Role.ATTENTION, Role.WEIGHT, Role.ROUTER)
        )
        return attention, weights, routers

    def _member_or_none(self, kv: KeyValue) -> Member | None:
        try:
            member = Member.decode(kv)
            if not kv.key.endswith(f"/{member.role}/{member.id}"):
                raise ValueError(f"the value is of {member.role}/{member.id}")
        except ValueError as error:
            if self._unreadable.get(kv.key) != kv.mod_revision:
                self._unreadable[kv.key] = kv.mod_revision
                log.warning("member_unreadable", key=kv.key, error=str(error))
            return None
        self._unreadable.pop(kv.key, None)
        return member

    async def _instances(self, members: Members) -> Sequence[Instance]:
        """What the provider has, after dropping what has ended and whose registration is gone, too."""
        instances = await self._provider.instances()
        self._memory.note_processes(instances, self._clock())
        for instance in instances:
            if not instance.running and instance.id not in members:
                await self._provider.forget(instance.id)
                self._memory.forget(instance.id)
        return await self._provider.instances()

    async def _observe(
        self, spec: AttentionSpec, members: Members, instances: Sequence[Instance], evidence: Evidence
    ) -> list[NodeView]:
        now_s = self._clock()
        self._memory.note_members(members, now_s)
        held = await self._nodes.held(members.values())
        seen_s = self._memory.last_seen_s
        answers = {node: item.answer for node, item in held.items()}
        reach = self._memory.reach.look(members.keys(), evidence, answers, now_s)
        views = observe(members.values(), instances, held, seen_s, now_s, self._patience, reach)
        self._memory.note_ready((view.id for view in views if view.phase is Phase.READY), instances, now_s)
        told_s = {member.id: member.leave_by_s for member in members.values()}
        return [with_deadline(view, spec, told_s.get(view.id, 0.0), now_s) for view in views]

    def _prudent(self, actions: Sequence[Action]) -> Sequence[Action]:
        """Nobody is let go while a new incarnation is young: not all who live may be registered in it yet,
        and records that it came with may be another cluster's."""
        if self._settling_s <= 0:
            return actions
        return [action for action in actions if not isinstance(action, Stop | Drain)]

    @property
    def _settling_s(self) -> float:
        """How long the present incarnation still counts as young."""
        return SETTLE_S - self._last_known.incarnation_age_s if self._last_known else 0.0

    async def _act(self, actions: Sequence[Action], spec: AttentionSpec, members: Members) -> list[str]:
        failures = []
        for action in actions:
            self._fenced.term.require()
            try:
                await self._do(action, spec, members)
            except (OSError, grpc.aio.AioRpcError) as error:
                failures.append(f"{action}: {_reason(error)}")
        return failures

    async def _do(self, action: Action, spec: AttentionSpec, members: Members) -> None:
        match action:
            case Start(count):
                await self._start(count, {*members, *spec.drained})
            case Drain(node, leave_by_s):
                deadline_s = max(leave_by_s - self._clock(), LEAST_DEADLINE_S) if leave_by_s else 0.0
                log.info("node_drain", node=node, deadline_s=round(deadline_s, 3))
                await self._nodes.drain(members[node], deadline_s)
            case Undrain(node):
                log.info("node_undrain", node=node)
                await self._nodes.undrain(members[node])
            case Stop(node, lost_tokens):
                await self._stop(node, members)
                if lost_tokens:
                    self._tell(happenings.of_deadline(node, lost_tokens))

    async def _start(self, count: int, taken: set[str]) -> None:
        if self._memory.backoff.wait_s(self._clock()) > 0:
            return
        taken |= {instance.id for instance in await self._provider.instances()}
        for node in free_ids(count, taken, preferred=self._preferred_ids):
            await _to_the_end(self._provider.start(node))

    async def _stop(self, node: str, members: Members) -> None:
        if node not in members and await self._store.get(self._keys.member(Role.ATTENTION, node)):
            return  # registered since the members were read; the next pass decides about it
        await self._provider.stop(node)

    async def _write(self, status: AttentionStatus, previous: AttentionStatus | None) -> None:
        """Write the status where it differs from what is there. `status/attention` is only ours to write."""
        signed = msgspec.structs.replace(status, leader=self._leader, epoch=self._fenced.term.epoch)
        if signed != previous:
            await self._fenced.put(self._keys.status_attention, encode(signed))

    def _news(
        self,
        spec: AttentionSpec,
        views: Sequence[NodeView],
        previous: AttentionStatus | None,
        status: AttentionStatus,
    ) -> list[Happening]:
        phases = {view.id: view.phase for view in views}
        before = self._memory.exchange_phases(phases)
        told = happenings.of_scale(previous.desired if previous else 0, spec)
        if previous is not None:
            told += happenings.of_conditions(previous.conditions, status.conditions)
        # A new leader does not know what was before: it begins with what it finds.
        return told + (happenings.of_nodes(before, phases) if before is not None else [])

    def _wish_s(self, spec: AttentionSpec, views: Sequence[NodeView]) -> float | None:
        waits_s = []
        if any(view.phase is Phase.DRAINING for view in views):
            waits_s.append(LEAVING_POLL_S)
        if (wait_s := self._memory.backoff.wait_s(self._clock())) > 0:
            waits_s.append(wait_s)
        if (wait_s := self._settling_s) > 0:
            waits_s.append(wait_s)
        if (change_s := self._memory.reach.next_change_s(self._clock())) is not None:
            waits_s.append(change_s)
        return min(waits_s, default=None)


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Cancelled half way, a start would leave a process of which nobody knows."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _worth_asking(weights: Iterable[Member]) -> list[Member]:
    """Weight nodes whose word would count; one that loads its model has not said anything yet."""
    return [member for member in weights if member.state is State.READY or member.lanes is not None]


def weight_views(weights: Iterable[Member], answers: Mapping[str, Answer]) -> list[WeightView]:
    """The weight nodes that are what their records say. Pure."""
    views = []
    for member in weights:
        answer = answers.get(member.id, Answer.YES)
        if answer is Answer.OTHER:
            continue
        gone = answer is Answer.REFUSED
        ready = member.state is State.READY and not gone
        views.append(WeightView(member.id, ready, Reason.NO_ANSWER if gone else member.reason))
    return views


def failed_canaries(routers: Iterable[Member]) -> dict[str, str]:
    """What routers say of canaries that fail, by id; nothing while one sees none fail. Pure."""
    serving = [member for member in routers if member.state is State.READY]
    failed = {member.id: member.canary for member in serving if member.canary}
    return failed if len(failed) == len(serving) else {}


def _status_or_none(value: bytes) -> AttentionStatus | None:
    try:
        return decode_status(value)
    except ValueError:  # written by another version; it is replaced
        return None


def _reason(error: OSError | grpc.aio.AioRpcError) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)
