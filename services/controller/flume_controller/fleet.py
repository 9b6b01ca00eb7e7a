"""One reconcile pass over the attention nodes: read all of the state, plan, act, report.

Decisions are in `plan.py`, `observe.py` and `status.py`; when to run a pass is in `reconcile.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import grpc
import structlog
from flume_common.keys import Keys
from flume_common.membership import Member, Role
from flume_common.store import KeyValue, Store

from flume_controller import desired
from flume_controller.memory import Memory
from flume_controller.nodes import Nodes
from flume_controller.observe import Patience, free_ids, observe
from flume_controller.plan import Action, Drain, NodeView, Phase, Start, Stop, Undrain, plan
from flume_controller.providers.base import Instance, Provider
from flume_controller.spec import AttentionSpec, AttentionStatus, decode_status, encode
from flume_controller.status import report

log = structlog.get_logger()

LEAVING_POLL_S = 0.3
"""That a draining node has become empty is seen only by asking it."""

Members = Mapping[str, Member]


class ActionsFailed(Exception):
    """Some actions of a pass failed; the others were done."""

    def __init__(self, failures: Sequence[str]) -> None:
        super().__init__("; ".join(failures))
        self.failures = tuple(failures)


class AttentionFleet:
    """Makes the attention nodes match the spec, one pass at a time."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        provider: Provider,
        nodes: Nodes,
        initial: AttentionSpec,
        *,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._keys = keys
        self._provider = provider
        self._nodes = nodes
        self._initial = initial
        self._patience = patience or Patience()
        self._clock = clock
        self._memory = Memory()

    async def reconcile(self) -> float | None:
        """One pass. Raises StoreError, InvalidSpec, ActionsFailed."""
        spec = await desired.ensure(self._store, self._keys, self._initial)
        members = await self._members()
        instances = await self._instances(members)
        views = await self._observe(members, instances)
        if sum(view.phase is Phase.READY for view in views) >= spec.desired:
            self._memory.all_ready(self._clock())
        failures = await self._act(plan(spec.desired, views), members)
        await self._report(spec, views, failures)
        if failures:
            raise ActionsFailed(failures)
        return self._wish_s(spec, views)

    async def _members(self) -> dict[str, Member]:
        # Read, not taken from a cached view: nothing is stopped on the strength of what was true once.
        found = await self._store.range(f"{self._keys.members}{Role.ATTENTION}/")
        members = (_member_or_none(kv) for kv in found.items.values())
        return {member.id: member for member in members if member is not None}

    async def _instances(self, members: Members) -> Sequence[Instance]:
        """What the provider has, after dropping what has ended and whose registration is gone, too."""
        instances = await self._provider.instances()
        self._memory.note_processes(instances, self._clock())
        for instance in instances:
            if not instance.running and instance.id not in members:
                await self._provider.forget(instance.id)
                self._memory.forget(instance.id)
        return await self._provider.instances()

    async def _observe(self, members: Members, instances: Sequence[Instance]) -> list[NodeView]:
        now_s = self._clock()
        self._memory.note_members(members, now_s)
        held = await self._nodes.held(members.values())
        return observe(members.values(), instances, held, self._memory.last_seen_s, now_s, self._patience)

    async def _act(self, actions: Sequence[Action], members: Members) -> list[str]:
        failures = []
        for action in actions:
            try:
                await self._do(action, members)
            except (OSError, grpc.aio.AioRpcError) as error:
                failures.append(f"{action}: {_reason(error)}")
        return failures

    async def _do(self, action: Action, members: Members) -> None:
        match action:
            case Start(count):
                await self._start(count, members)
            case Drain(node):
                log.info("node_drain", node=node)
                await self._nodes.drain(members[node])
            case Undrain(node):
                log.info("node_undrain", node=node)
                await self._nodes.undrain(members[node])
            case Stop(node):
                await self._stop(node, members)

    async def _start(self, count: int, members: Members) -> None:
        if self._memory.backoff.wait_s(self._clock()) > 0:
            return
        taken = {instance.id for instance in await self._provider.instances()}
        for node in free_ids(count, taken | members.keys()):
            await self._provider.start(node)

    async def _stop(self, node: str, members: Members) -> None:
        if node not in members and await self._store.get(self._keys.member(Role.ATTENTION, node)):
            return  # registered since the members were read; the next pass decides about it
        await self._provider.stop(node)

    async def _report(self, spec: AttentionSpec, views: Sequence[NodeView], failures: Sequence[str]) -> None:
        """Write the status where it differs from what is there. `status/attention` is only ours to write."""
        found = await self._store.get(self._keys.status_attention)
        previous = _status_or_none(found.value) if found else None
        status = report(spec, views, self._memory.crashes, failures, previous, self._clock())
        if status != previous:
            await self._store.put(self._keys.status_attention, encode(status))

    def _wish_s(self, spec: AttentionSpec, views: Sequence[NodeView]) -> float | None:
        waits_s = []
        if any(view.phase is Phase.DRAINING for view in views):
            waits_s.append(LEAVING_POLL_S)
        if (wait_s := self._memory.backoff.wait_s(self._clock())) > 0:
            waits_s.append(wait_s)
        return min(waits_s, default=None)


def _member_or_none(kv: KeyValue) -> Member | None:
    try:
        return Member.decode(kv)
    except ValueError as error:
        log.warning("member_unreadable", key=kv.key, error=str(error))
        return None


def _status_or_none(value: bytes) -> AttentionStatus | None:
    try:
        return decode_status(value)
    except ValueError:  # written by another version; it is replaced
        return None


def _reason(error: OSError | grpc.aio.AioRpcError) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)
