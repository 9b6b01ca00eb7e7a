"""What operators want, in the admin API: the count, single nodes drained, the autoscaler.

Every change is an edit of `spec/attention` that compares the revision it was decided at; the leader
acts on it, whoever took the call.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import grpc
import msgspec
from flume_common import config_store
from flume_common.config_schema import ConfigError, Path, Scope
from flume_common.membership import Member, Role
from flume_common.serving import status_errors
from flume_protos.v1 import admin_pb2 as pb

from flume_controller import desired
from flume_controller.admin_sources import SPEC_STATUS_OF, Context, Sources
from flume_controller.desired import InvalidSpec
from flume_controller.salvage import salvaged
from flume_controller.spec import Actor, AttentionSpec, Autoscale, Deadline

TPOT_SLO = Path(Scope.CONTROLLER, "tpot_slo_ms")
# A node that was let go may come back, from a stop or a cut: its name stays. Long before there are so many
# later ones it is gone for good.
_REMEMBERED = 256


class UnknownActor(ValueError):
    """`actor` is none of those that may set the desired count."""


class InvalidBounds(ValueError):
    """The autoscaler's bounds are crossed or outside of the spec's."""


class InvalidDeadline(ValueError):
    """`deadline_s` is no time."""


class UnknownNode(Exception):
    def __init__(self, node: str) -> None:
        super().__init__(f"there is no attention node {node!r}")
        self.node = node


class NotDrained(Exception):
    def __init__(self, node: str) -> None:
        super().__init__(f"{node} was not drained by name; a scale that let it go is taken back by a scale")
        self.node = node


class NodeSilent(Exception):
    def __init__(self, node: str, detail: str) -> None:
        super().__init__(f"{node} is no longer to be drained, but did not hear so: {detail}; try again")
        self.node = node


STATUS_OF: dict[type[Exception], grpc.StatusCode] = {
    UnknownActor: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidDeadline: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidBounds: grpc.StatusCode.INVALID_ARGUMENT,
    ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownNode: grpc.StatusCode.NOT_FOUND,
    NotDrained: grpc.StatusCode.FAILED_PRECONDITION,
    NodeSilent: grpc.StatusCode.UNAVAILABLE,
    **SPEC_STATUS_OF,
}

SpecEdit = Callable[[AttentionSpec], AttentionSpec]


class SpecRpcs:
    """See admin.proto: Scale, DrainNode, UndrainNode, SetAutoscale."""

    def __init__(self, sources: Sources) -> None:
        self._from = sources

    async def Scale(self, request: pb.ScaleRequest, context: Context) -> pb.ScaleReply:
        async with status_errors(context, STATUS_OF):
            actor, deadline_s = _actor(request.actor), _deadline_s(request.deadline_s)
            current = request.current_replicas if request.HasField("current_replicas") else None
            before, after = await self._edit(
                lambda spec: desired.changed(
                    spec,
                    request.replicas,
                    actor=actor,
                    current=current,
                    deadline_s=deadline_s,
                    now_s=time.time(),
                ),
                revision=request.revision if request.HasField("revision") else None,
                dry_run=request.dry_run,
                repair=lambda error: salvaged(error.value, self._from.report.status),
            )
        return pb.ScaleReply(previous=before.desired, replicas=after.desired, generation=after.generation)

    async def DrainNode(self, request: pb.DrainNodeRequest, context: Context) -> pb.DrainNodeReply:
        async with status_errors(context, STATUS_OF):
            deadline_s = _deadline_s(request.deadline_s)
            spec, _ = await desired.read(self._from.store, self._from.keys)
            if spec is None or request.node not in spec.drained:
                await self._require(request.node)
            before, after = await self._edit(
                lambda spec: drained(spec, request.node, deadline_s=deadline_s, now_s=time.time()),
                dry_run=request.dry_run,
            )
        return pb.DrainNodeReply(changed=after != before, generation=after.generation)

    async def UndrainNode(self, request: pb.DrainNodeRequest, context: Context) -> pb.DrainNodeReply:
        async with status_errors(context, STATUS_OF):
            spec, _ = await desired.read(self._from.store, self._from.keys)
            if spec is None or request.node not in spec.drained:
                await self._require(request.node)
            before, after = await self._edit(
                lambda spec: undrained(spec, request.node, now_s=time.time()), dry_run=request.dry_run
            )
            member = self._member(request.node)
            if member is not None and not request.dry_run:
                # Told at once: by itself a pass leaves a draining node alone while the count is right.
                await self._undrain(member)
        return pb.DrainNodeReply(changed=after != before, generation=after.generation)

    async def SetAutoscale(self, request: pb.SetAutoscaleRequest, context: Context) -> pb.SetAutoscaleReply:
        async with status_errors(context, STATUS_OF):
            # Checked first and written last, so that a refused bound leaves the setting alone, too.
            await self._set_slo(request, dry_run=True)
            before, after = await self._edit(
                lambda spec: desired.with_autoscale(spec, autoscale_of(spec, request), now_s=time.time()),
                dry_run=request.dry_run,
            )
            if not request.dry_run:
                await self._set_slo(request, dry_run=False)
        return pb.SetAutoscaleReply(
            before=autoscale_message(before.autoscale),
            after=autoscale_message(after.autoscale),
            generation=after.generation,
        )

    async def _edit(
        self,
        change: SpecEdit,
        *,
        revision: int | None = None,
        dry_run: bool,
        repair: Callable[[InvalidSpec], AttentionSpec] | None = None,
    ) -> tuple[AttentionSpec, AttentionSpec]:
        return await desired.edit(
            self._from.store, self._from.keys, change, revision=revision, repair=repair, dry_run=dry_run
        )

    async def _require(self, node: str) -> None:
        """Raises UnknownNode."""
        if self._member(node) is None and node not in {
            item.id for item in await self._from.provider.instances() if item.running
        }:
            raise UnknownNode(node)

    def _member(self, node: str) -> Member | None:
        return self._from.members.current.get((Role.ATTENTION, node))

    async def _undrain(self, member: Member) -> None:
        try:
            await self._from.nodes.undrain(member)
        except grpc.aio.AioRpcError as error:
            raise NodeSilent(member.id, error.details() or error.code().name) from error

    async def _set_slo(self, request: pb.SetAutoscaleRequest, *, dry_run: bool) -> None:
        if request.HasField("tpot_slo_ms"):
            await config_store.set_values(
                self._from.store,
                self._from.keys,
                {TPOT_SLO: f"{request.tpot_slo_ms:.15g}"},
                by=request.actor or "unknown",
                now_s=time.time(),
                dry_run=dry_run,
            )


def _actor(name: str) -> Actor:
    try:
        return Actor(name) if name else Actor.USER
    except ValueError:
        raise UnknownActor(f"actor must be one of {', '.join(Actor)}, got {name!r}") from None


def _deadline_s(deadline_s: float) -> float:
    if not 0 <= deadline_s < math.inf:
        raise InvalidDeadline(f"deadline_s must be a time, got {deadline_s}")
    return deadline_s


def drained(spec: AttentionSpec, node: str, *, deadline_s: float = 0.0, now_s: float) -> AttentionSpec:
    """The next generation of `spec`, or `spec` itself when `node` is drained so already. Pure.

    Of two drains of one node the last counts, also where it is the one without a deadline.
    """
    others = {name: item for name, item in spec.drain_deadlines.items() if name != node}
    deadline = desired.deadline_from(deadline_s, now_s)
    if node in spec.drained and deadline is None and node not in spec.drain_deadlines:
        return spec
    names = spec.drained if node in spec.drained else (*spec.drained, node)[-_REMEMBERED:]
    others = {name: item for name, item in others.items() if name in names}
    return _with_drained(spec, names, others | ({node: deadline} if deadline else {}), now_s)


def undrained(spec: AttentionSpec, node: str, *, now_s: float) -> AttentionSpec:
    """The next generation of `spec`. Pure. Raises NotDrained."""
    if node not in spec.drained:
        raise NotDrained(node)
    others = {name: item for name, item in spec.drain_deadlines.items() if name != node}
    return _with_drained(spec, tuple(item for item in spec.drained if item != node), others, now_s)


def _with_drained(
    spec: AttentionSpec, nodes: tuple[str, ...], deadlines: dict[str, Deadline], now_s: float
) -> AttentionSpec:
    return msgspec.structs.replace(
        spec,
        drained=nodes,
        drain_deadlines=deadlines,
        generation=spec.generation + 1,
        updated_at_s=now_s,
    )


def autoscale_of(spec: AttentionSpec, request: pb.SetAutoscaleRequest) -> Autoscale:
    """The bounds asked for, or as they were; enabling ends a pause. Pure. Raises InvalidBounds."""
    least = request.min if request.HasField("min") else spec.autoscale.min
    most = request.max if request.HasField("max") else spec.autoscale.max
    if not 1 <= least <= most <= spec.max:
        raise InvalidBounds(f"bounds must be 1 <= min <= max <= {spec.max}, got {least} to {most}")
    return Autoscale(enabled=request.enabled, min=least, max=most)


def autoscale_message(autoscale: Autoscale) -> pb.Autoscale:
    return pb.Autoscale(
        enabled=autoscale.enabled, paused=autoscale.paused, min=autoscale.min, max=autoscale.max
    )
