"""gRPC face of the controller: decode, ask, encode. Decisions live in `desired.py` and `plan.py`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable

import grpc
from flume_common import config_store
from flume_common.incarnation import Record
from flume_common.membership import Member, Role, State
from flume_common.route_store import decode_route
from flume_common.serving import status_errors
from flume_common.store import KeyValue
from flume_protos.v1 import admin_pb2 as pb
from flume_protos.v1 import admin_pb2_grpc as rpc
from flume_protos.v1 import attention_pb2, common_pb2, weight_pb2

from flume_controller import desired
from flume_controller.admin_sources import SPEC_STATUS_OF, Context, Sources
from flume_controller.config_admin import ConfigRpcs, setting_message
from flume_controller.describe import Everything, NoSuchThing, NotKnown, UnknownKind, describe
from flume_controller.desired import InvalidSpec
from flume_controller.event_admin import EventRpcs, event_message
from flume_controller.observe import Held
from flume_controller.providers.base import Instance
from flume_controller.spec import AttentionSpec, AttentionStatus, Autoscale, Condition, Unready
from flume_controller.spec_admin import SpecRpcs, autoscale_message

__all__ = ["AdminServicer", "Sources"]

STATUS_OF: dict[type[Exception], grpc.StatusCode] = {
    UnknownKind: grpc.StatusCode.INVALID_ARGUMENT,
    NoSuchThing: grpc.StatusCode.NOT_FOUND,
    NotKnown: grpc.StatusCode.UNAVAILABLE,
    **SPEC_STATUS_OF,
}
"""The first entry that an error is an instance of counts."""

_REASON_CHARS = 200
STORE_TICK_S = 1.0
"""Whether etcd answers changes without any view changing."""


class AdminServicer(SpecRpcs, ConfigRpcs, EventRpcs, rpc.AdminServicer):
    """See admin.proto. Here: what is; the bases: what is wanted, settings, events."""

    def __init__(self, sources: Sources) -> None:
        self._from = sources

    async def Status(self, request: pb.StatusRequest, context: Context) -> AsyncIterator[pb.StatusReply]:
        seen, last = self._versions(), self._status()
        yield await self._with_activity(last)
        while request.watch:
            seen = await self._wait_newer(seen)
            if (reply := self._status()) != last:
                last = reply
                yield await self._with_activity(reply)

    async def ListNodes(self, request: pb.ListNodesRequest, context: Context) -> pb.ListNodesReply:
        instances = {item.id: item for item in await self._from.provider.instances()}
        ended = {id for id, item in instances.items() if not item.running}
        # A process that is known to have ended is gone, although its lease has yet to run out.
        members = [m for m in self._from.members.current.values() if m.id not in ended]
        held = await self._from.nodes.held(m for m in members if m.role is Role.ATTENTION)
        now_s = time.time()
        status = self._from.report.status
        unready = status.unready if status else {}
        nodes = [
            node_message(
                member,
                held.get(member.id),
                now_s,
                unready.get(member.id) if member.role is Role.ATTENTION else None,
            )
            for member in members
        ]
        unregistered = instances.keys() - ended - {member.id for member in members}
        nodes += [unregistered_message(instances[id], now_s) for id in unregistered]
        return pb.ListNodesReply(nodes=in_order(nodes), revision=self._from.members.revision)

    async def ListRoutes(self, request: pb.ListRoutesRequest, context: Context) -> pb.ListRoutesReply:
        async with status_errors(context, STATUS_OF):
            snapshot = await self._from.store.range(self._from.keys.routes)
        routes, unreadable = readable_routes(snapshot.items.values())
        return pb.ListRoutesReply(
            routes=[route for route in routes if request.sequence in ("", route.sequence)],
            revision=snapshot.revision,
            unreadable=unreadable,
        )

    async def ListRequests(self, request: pb.ListRequestsRequest, context: Context) -> pb.ListRequestsReply:
        weights = self._from.members.of(Role.WEIGHT)
        answers = await asyncio.gather(*(self._from.nodes.sequences(member) for member in weights))
        requests = [
            pb.Request(
                id=item.sequence,
                weight_node=member.id,
                state=item.state,
                prompt_tokens=item.prompt_tokens,
                completion_tokens=item.completion_tokens,
                age_s=item.age_s,
                computed_tokens=item.computed_tokens,
            )
            for member, items in zip(weights, answers, strict=True)
            for item in items or ()
        ]
        unanswered = [member.id for member, items in zip(weights, answers, strict=True) if items is None]
        return pb.ListRequestsReply(requests=requests, unanswered=unanswered)

    async def Describe(self, request: pb.DescribeObjectRequest, context: Context) -> pb.DescribeObjectReply:
        async with status_errors(context, STATUS_OF):
            reply = describe(request.kind, request.name, await self._everything(context))
            if request.kind == "node":
                reply.lanes.extend(await self._lanes(request.name))
                if (member := self._from.members.current.get((Role.WEIGHT, request.name))) is not None:
                    reply.activity.MergeFrom(
                        await self._from.nodes.activity(member) or weight_pb2.WeightStatusReply()
                    )
            if request.kind == "cluster":
                reply.spec_revision = await self._spec_revision()
                entries = await config_store.read(self._from.store, self._from.keys)
                reply.settings.extend(setting_message(item) for item in entries if item.text is not None)
                reply.status.CopyFrom(await self._with_activity(self._status()))
        return reply

    async def _spec_revision(self) -> int:
        try:
            _, revision = await desired.read(self._from.store, self._from.keys)
        except InvalidSpec as error:
            return error.revision
        return revision

    async def _everything(self, context: Context) -> Everything:
        nodes, routes, requests = await asyncio.gather(
            self.ListNodes(pb.ListNodesRequest(), context),
            self.ListRoutes(pb.ListRoutesRequest(), context),
            self.ListRequests(pb.ListRequestsRequest(), context),
        )
        events = [event_message(event) for event in self._from.events.listed()]
        return Everything(nodes.nodes, routes.routes, requests.requests, requests.unanswered, events)

    async def _lanes(self, node: str) -> list[attention_pb2.LaneStats]:
        member = self._from.members.current.get((Role.ATTENTION, node))
        stats = await self._from.nodes.stats(member) if member else None
        return list(stats.lanes) if stats else []

    def _status(self) -> pb.StatusReply:
        return status_message(
            self._from.keys.cluster,
            self._from.wish.spec,
            self._from.report.status,
            self._from.members.current.values(),
            self._from.store.connected,
            self._from.incarnation.record,
        )

    async def _with_activity(self, status: pb.StatusReply) -> pb.StatusReply:
        weights = sorted(self._from.members.of(Role.WEIGHT), key=lambda member: member.id)
        answers = await asyncio.gather(*(self._from.nodes.activity(member) for member in weights))
        full = pb.StatusReply()
        full.CopyFrom(status)
        full.activity.extend(answer for answer in answers if answer is not None)
        pairs = zip(weights, answers, strict=True)
        full.unanswered.extend(member.id for member, answer in pairs if answer is None)
        return full

    def _versions(self) -> tuple[int, int, int]:
        return self._from.members.version, self._from.wish.version, self._from.report.version

    async def _wait_newer(self, seen: tuple[int, int, int]) -> tuple[int, int, int]:
        waits = [
            asyncio.ensure_future(self._from.members.wait_newer(seen[0])),
            asyncio.ensure_future(self._from.wish.wait_newer(seen[1])),
            asyncio.ensure_future(self._from.report.wait_newer(seen[2])),
        ]
        try:
            await asyncio.wait(waits, timeout=STORE_TICK_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return self._versions()


def readable_routes(items: Iterable[KeyValue]) -> tuple[list[common_pb2.Route], list[str]]:
    """The routes, and of values that are none the keys and what is wrong with them. Pure."""
    routes, unreadable = [], []
    for kv in items:
        try:
            routes.append(decode_route(kv).to_proto())
        except (ValueError, TypeError, RecursionError) as error:
            unreadable.append(f"{kv.key}: {str(error)[:_REASON_CHARS]}")
    return routes, unreadable


def status_message(
    cluster: str,
    spec: AttentionSpec | None,
    status: AttentionStatus | None,
    members: Iterable[Member],
    store_connected: bool,
    incarnation: Record | None = None,
) -> pb.StatusReply:
    """Desired from the spec, the rest from the last report; a report may be older than the spec."""
    members = list(members)
    ready = [member for member in members if member.state is State.READY]
    return pb.StatusReply(
        cluster=cluster,
        # One that can't be read wants nothing else than the last one that could.
        desired=spec.desired if spec else status.desired if status else 0,
        ready=status.ready if status else 0,
        preparing=status.preparing if status else 0,
        draining=status.draining if status else 0,
        generation=spec.generation if spec else status.observed_generation if status else 0,
        observed_generation=status.observed_generation if status else 0,
        conditions=[_condition(item) for item in status.conditions] if status else (),
        weight_nodes=sum(member.role is Role.WEIGHT for member in ready),
        routers=sum(member.role is Role.ROUTER for member in ready),
        store_connected=store_connected,
        model=next((member.model for member in (*ready, *members) if member.role is Role.WEIGHT), ""),
        set_by=spec.set_by if spec else "",
        min=spec.min if spec else 0,
        max=spec.max if spec else 0,
        autoscale=autoscale_message(spec.autoscale if spec else Autoscale()),
        leader=status.leader if status else "",
        incarnation=_incarnation(incarnation) if incarnation else None,
        drained=spec.drained if spec else (),
        leaving=[
            pb.Leaving(node=member.id, by_s=member.leave_by_s)
            for member in sorted(members, key=lambda member: member.leave_by_s)
            if member.state is State.DRAINING and member.leave_by_s
        ],
    )


def _incarnation(record: Record) -> pb.StoreIncarnation:
    return pb.StoreIncarnation(id=record.id, since_s=record.created_at_s, reason=record.reason)


def _condition(item: Condition) -> pb.Condition:
    return pb.Condition(
        type=item.type,
        status=item.status,
        reason=item.reason,
        message=item.message,
        last_transition_time_s=item.last_transition_time_s,
        observed_generation=item.observed_generation,
    )


def node_message(member: Member, held: Held | None, now_s: float, unready: Unready | None = None) -> pb.Node:
    """A registered node; `held` is fresher than its own record, `unready` says that READY is only claimed."""
    claimed = unready is not None and member.state is State.READY
    return pb.Node(
        id=member.id,
        role=member.role,
        state=unready.state if claimed and unready else member.state,
        reason=unready.reason if claimed and unready else member.reason,
        pid=member.pid,
        host=member.host,
        address=member.address,
        epoch=member.epoch,
        kv_capacity_tokens=member.kv_capacity_tokens,
        kv_used_tokens=held.used_tokens if held else member.kv_used_tokens,
        age_s=max(0.0, now_s - member.started_at_s),
        version=member.version,
        sequences=held.sequences if held else member.sequences,
        engine_deaths=member.engine_deaths,
        last_engine_error=member.last_engine_error,
        last_engine_death_s=member.last_engine_death_s,
        model_failures=member.model_failures,
        last_model_failure=member.last_model_failure,
        leave_by_s=member.leave_by_s,
        metrics_address=member.metrics_address,
    )


def unregistered_message(instance: Instance, now_s: float) -> pb.Node:
    """A node whose process runs and that has not registered yet."""
    return pb.Node(
        id=instance.id,
        role=Role.ATTENTION,
        state=State.DRAINING if instance.stopping else State.PREPARING,
        pid=instance.pid,
        age_s=max(0.0, now_s - instance.started_at_s),
    )


def in_order(nodes: Iterable[pb.Node]) -> list[pb.Node]:
    """By role, then by number: attention-2 before attention-10."""
    roles = list(Role)
    return sorted(nodes, key=lambda node: (roles.index(Role(node.role)), len(node.id), node.id))
