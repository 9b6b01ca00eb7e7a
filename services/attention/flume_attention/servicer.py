"""gRPC face of an attention node: decode, ask the engine, encode. Decisions are the engine's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import grpc
import msgspec
import structlog
from flume_common.engine_progress import Progress, activity_message
from flume_common.layout import KvLayout, LayoutMismatch
from flume_common.membership import State
from flume_common.serving import status_errors
from flume_common.wire import PROTOCOL_VERSION
from flume_protos.v1 import attention_pb2 as pb
from flume_protos.v1 import attention_pb2_grpc as rpc
from flume_protos.v1 import common_pb2

from flume_attention import messages as m
from flume_attention.claims import Claim, Claims
from flume_attention.errors import (
    AttachRefused,
    ClaimRefused,
    ClaimUnverified,
    EngineBusy,
    EngineGone,
    LenderGone,
)
from flume_attention.pulling import PULL_TIMEOUT_S, pull
from flume_attention.supervisor import Supervisor

log = structlog.get_logger()

STATUS_OF: dict[type[Exception], grpc.StatusCode] = {
    AttachRefused: grpc.StatusCode.FAILED_PRECONDITION,
    ClaimRefused: grpc.StatusCode.FAILED_PRECONDITION,
    ClaimUnverified: grpc.StatusCode.UNAVAILABLE,
    LayoutMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    EngineBusy: grpc.StatusCode.RESOURCE_EXHAUSTED,
    EngineGone: grpc.StatusCode.UNAVAILABLE,
    LenderGone: grpc.StatusCode.UNAVAILABLE,
    ValueError: grpc.StatusCode.INVALID_ARGUMENT,
}
_STATE = {
    State.PREPARING: common_pb2.PREPARING,
    State.READY: common_pb2.READY,
    State.DRAINING: common_pb2.DRAINING,
}


VERIFY_S = 4.0
"""The longest that a message waits for etcd, where its sender waits so long."""
MARGIN_S = 0.2
"""Left of a caller's time, so that it hears why."""

_Context = grpc.aio.ServicerContext[Any, Any]
_Claiming = pb.AttachRequest | pb.RenewRequest | pb.DetachRequest | pb.AdoptRequest | pb.PullRequest


class AttentionServicer(rpc.AttentionServicer):
    """`epoch` gives the node's own fencing number, which a lost lease changes."""

    def __init__(self, node: str, kv_bytes: int, supervisor: Supervisor, epoch: Callable[[], int]) -> None:
        self.node = node  # a standby learns it late; nobody calls it before
        self.claims: Claims | None = None  # set before others can know of this node
        self._kv_bytes = kv_bytes
        self._supervisor = supervisor
        self._epoch = epoch

    async def Attach(
        self, request: pb.AttachRequest, context: grpc.aio.ServicerContext[pb.AttachRequest, pb.AttachReply]
    ) -> pb.AttachReply:
        async with status_errors(context, STATUS_OF):
            self._require_meant(request.node)
            layout, epoch = _layout(request), self._epoch()
            theirs = await self._verified(request, context)
            attached = await self._supervisor.attach(
                lambda number: _attach(number, request, layout, theirs, epoch)
            )
        log.info("lane_attached", weight_node=request.weight_node, epoch=request.epoch, layout=layout.hash,
                 **_hop(attached))  # fmt: skip
        return pb.AttachReply(
            node=self.node,
            epoch=epoch,
            worker_address=attached.worker_address,
            lane=attached.lane,
            capacity_blocks=attached.capacity_blocks,
            direct_region=attached.direct_region,
        )

    async def Renew(
        self, request: pb.RenewRequest, context: grpc.aio.ServicerContext[pb.RenewRequest, pb.RenewReply]
    ) -> pb.RenewReply:
        async with status_errors(context, STATUS_OF):
            epoch = await self._verified(request, context)
            renewed = await self._supervisor.ask(
                lambda number: m.Renew(request=number, weight_node=request.weight_node, epoch=epoch),
                m.Renewed,
            )
        if renewed.attached:
            log.info("lane_renewed", weight_node=request.weight_node, epoch=request.epoch)
        return pb.RenewReply(attached=renewed.attached)

    async def Detach(
        self, request: pb.DetachRequest, context: grpc.aio.ServicerContext[pb.DetachRequest, pb.DetachReply]
    ) -> pb.DetachReply:
        async with status_errors(context, STATUS_OF):
            epoch = await self._verified(request, context)
            await self._supervisor.ask(
                lambda number: m.Detach(request=number, weight_node=request.weight_node, epoch=epoch),
                m.Detached,
            )
        return pb.DetachReply()

    async def Adopt(
        self, request: pb.AdoptRequest, context: grpc.aio.ServicerContext[pb.AdoptRequest, pb.AdoptReply]
    ) -> pb.AdoptReply:
        async with status_errors(context, STATUS_OF):
            epoch = await self._verified(request, context)
            lost_below = await self._over_below(request, context)
            kept = await self._supervisor.ask(
                lambda number: m.Adopt(
                    request=number,
                    weight_node=request.weight_node,
                    epoch=epoch,
                    sequence=request.sequence,
                    lost_node=request.lost_node if lost_below else "",
                    lost_below=lost_below,
                ),
                m.Kept,
            )
        ranges = [pb.HeldRange(start=start, tokens=tokens) for start, tokens in kept.ranges]
        return pb.AdoptReply(ranges=ranges, in_use=kept.in_use)

    async def Lend(
        self, request: pb.LendRequest, context: grpc.aio.ServicerContext[pb.LendRequest, pb.LendReply]
    ) -> pb.LendReply:
        async with status_errors(context, STATUS_OF):
            layout, epoch = _layout(request), self._epoch()
            lent = await self._supervisor.ask(
                lambda number: m.Lend(
                    request=number,
                    puller=request.puller,
                    epoch=request.epoch,
                    layout=layout,
                    worker_address=request.worker_address,
                    lane=request.lane,
                    chunk_bytes=request.chunk_bytes,
                    node_epoch=epoch,
                ),
                m.Lent,
            )
        log.info("ranges_lent", puller=request.puller)
        return pb.LendReply(epoch=epoch, worker_address=lent.worker_address, lane=lent.lane)

    async def Pull(
        self, request: pb.PullRequest, context: grpc.aio.ServicerContext[pb.PullRequest, pb.PullReply]
    ) -> pb.PullReply:
        async with status_errors(context, STATUS_OF):
            theirs = await self._verified(request, context)
            remaining_s = context.time_remaining() or PULL_TIMEOUT_S
            reply = await pull(
                self._supervisor, self.node, self._epoch(), request, theirs, timeout_s=remaining_s
            )
        log.info("ranges_pulled", lender=request.lender, weight_node=request.weight_node,
                 asked=len(request.ranges), pulled=len(reply.ranges), reason=reply.reason)  # fmt: skip
        return reply

    async def Stats(
        self, request: pb.StatsRequest, context: grpc.aio.ServicerContext[pb.StatsRequest, pb.StatsReply]
    ) -> pb.StatsReply:
        supervisor = self._supervisor
        report = await supervisor.fresh_report()
        stale = self.claims.stale if self.claims else 0
        return stats(
            self.node, self._kv_bytes, supervisor.state, report, supervisor.progress, stale_claims=stale
        )

    async def _verified(self, request: _Claiming, context: _Context) -> int:
        """The weight node's epoch, for the engine. Raises ClaimRefused, ClaimUnverified, ValueError."""
        if self.claims is None:
            raise ClaimUnverified("this node has not registered yet")
        credentials = request.credentials
        claim = Claim(request.weight_node, request.epoch, credentials.incarnation, credentials.secret)
        return await self.claims.require(claim, timeout_s=_budget_s(context))

    async def _over_below(self, request: pb.AdoptRequest, context: _Context) -> int:
        """As `Claims.over_below`. A weight node need not be told that itself is over."""
        if not request.lost_node or request.lost_node == request.weight_node or self.claims is None:
            return 0
        return await self.claims.over_below(
            request.lost_node,
            request.lost_below,
            request.credentials.incarnation,
            timeout_s=_budget_s(context),
        )

    async def Drain(
        self, request: pb.DrainRequest, context: grpc.aio.ServicerContext[pb.DrainRequest, pb.DrainReply]
    ) -> pb.DrainReply:
        async with status_errors(context, STATUS_OF):
            self._require_meant(request.node)
            leave_by_s = _leave_by_s(request.deadline_s)
        log.info("draining", deadline_s=request.deadline_s)
        await self._supervisor.set_draining(True, leave_by_s=leave_by_s)
        return pb.DrainReply()

    async def Undrain(
        self,
        request: pb.UndrainRequest,
        context: grpc.aio.ServicerContext[pb.UndrainRequest, pb.UndrainReply],
    ) -> pb.UndrainReply:
        async with status_errors(context, STATUS_OF):
            self._require_meant(request.node)
        log.info("undrained")
        await self._supervisor.set_draining(False)
        return pb.UndrainReply()

    def _require_meant(self, node: str) -> None:
        """Raises AttachRefused when another node is meant: any record may give our address as its own."""
        if node and node != self.node:
            raise AttachRefused("node", f"this is attention node {self.node}, not {node}")


def _budget_s(context: _Context) -> float:
    """How long etcd may take to confirm what a message claims."""
    remaining_s = context.time_remaining()
    return VERIFY_S if remaining_s is None else min(VERIFY_S, remaining_s - MARGIN_S)


def _layout(request: pb.AttachRequest | pb.LendRequest) -> KvLayout:
    """Raises AttachRefused, LayoutMismatch or ValueError. The version says what all the rest means."""
    if request.protocol_version != PROTOCOL_VERSION:
        raise AttachRefused(
            "protocol_version",
            f"protocol_version {request.protocol_version}: this node speaks {PROTOCOL_VERSION}",
        )
    if isinstance(request, pb.AttachRequest) and not request.weight_node:
        raise ValueError("weight_node is empty")
    return KvLayout.from_proto(request.layout)


def _leave_by_s(deadline_s: float) -> float:
    """Unix time; 0 without a deadline. Raises ValueError."""
    if not 0 <= deadline_s < math.inf:
        raise ValueError(f"deadline_s must be a time, got {deadline_s}")
    return time.time() + deadline_s if deadline_s else 0.0


def _attach(
    number: int, request: pb.AttachRequest, layout: KvLayout, epoch: int, node_epoch: int
) -> m.Attach:
    return m.Attach(
        request=number,
        weight_node=request.weight_node,
        epoch=epoch,
        layout=layout,
        worker_address=request.worker_address,
        lane=request.lane,
        max_step_tokens=request.max_step_tokens,
        max_step_sequences=request.max_step_sequences,
        kv_frame_bytes=request.kv_frame_bytes,
        node_epoch=node_epoch,
        direct=request.direct,
    )


def _hop(attached: m.Attached) -> dict[str, str]:
    """For the log. A region that is offered may still not be mapped."""
    if attached.direct_region:
        return {"hop": "direct"}
    return {"hop": "frames"} | ({"reason": attached.no_region} if attached.no_region else {})


def stats(
    node: str,
    kv_bytes: int,
    state: State,
    report: m.Report,
    progress: Progress | None = None,
    *,
    stale_claims: int = 0,
) -> pb.StatsReply:
    """The engine's report as the API shows it, and what it is doing."""
    lanes = [
        pb.LaneStats(**{name: getattr(lane, name) for name in m.LaneReport.__struct_fields__})
        for lane in report.lanes
    ]
    return pb.StatsReply(
        node=node,
        state=_STATE[state],
        capacity_tokens=report.capacity_tokens,
        used_tokens=report.used_tokens,
        capacity_blocks=report.capacity_blocks,
        used_blocks=report.used_blocks,
        kv_bytes=kv_bytes,
        epoch_rejected=report.epoch_rejected + stale_claims,
        lanes=lanes,
        safe_to_delete=safe_to_delete(state, report),
        orphan_tokens=report.orphan_tokens,
        pulled_tokens=report.pulled_tokens,
        pulls_refused=report.pulls_refused,
        reads=pb.ReadSums(**msgspec.structs.asdict(report.reads)),
        engine=activity_message(progress) if progress is not None else None,
    )


def safe_to_delete(state: State, report: m.Report) -> bool:
    """DRAINING, and nothing is held or promised: no sequence loses tokens when this node goes.

    A weight node that has credit may be appending here just now.
    """
    holds = report.used_blocks > 0 or any(lane.sequences or lane.granted_blocks for lane in report.lanes)
    return state is State.DRAINING and not holds
