"""A pull as the supervisor conducts it: ask the own engine, then the lender's node, then let them read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import grpc
from flume_common.tasks import background
from flume_common.wire import PROTOCOL_VERSION, sequence_key
from flume_protos.v1 import attention_pb2 as pb
from flume_protos.v1 import attention_pb2_grpc as rpc

from flume_attention import messages as m
from flume_attention.errors import LenderGone
from flume_attention.supervisor import Supervisor

PULL_TIMEOUT_S = 600.0  # where the caller names none
STANDSTILL_S = (
    20.0  # a pull of which nothing arrives for so long is ended; one that goes on may take its time
)
_END_S = 5.0  # for the engine's last word on it
_LEND_TIMEOUT_S = 5.0


async def pull(
    supervisor: Supervisor,
    node: str,
    epoch: int,
    request: pb.PullRequest,
    weight_epoch: int,
    *,
    timeout_s: float,
) -> pb.PullReply:
    """`weight_epoch` is the weight node's, verified. Leaves nothing half done.

    Ended early, for want of time or of progress, it still says what had arrived whole. Raises EngineGone,
    AttachRefused and LenderGone.
    """
    until_s = time.monotonic() + timeout_s
    prepared = await supervisor.ask(
        lambda number: m.PreparePull(request=number),
        m.Prepared,
        give_up=lambda number: m.EndPull(request=number),
    )
    try:
        lent = await _lend(request.lender_address, node, epoch, prepared)
    except BaseException:
        supervisor.tell(m.EndPull(request=prepared.request))
        raise
    number = 0

    def make(request_number: int) -> m.Pull:
        nonlocal number
        number = request_number
        return m.Pull(
            request=request_number,
            weight_node=request.weight_node,
            epoch=weight_epoch,
            lender=request.lender,
            lender_epoch=lent.epoch,
            lender_worker_address=lent.worker_address,
            lender_lane=lent.lane,
            lane=prepared.lane,
            ranges=[(item.sequence, item.start, item.tokens) for item in request.ranges],
            node_epoch=epoch,
        )

    left_s = max(0.0, until_s - time.monotonic())
    end_at_s = until_s - min(_END_S, left_s / 4)
    async with background(
        end=_end_if_stuck(supervisor, end_at_s, lambda: supervisor.tell(m.EndPull(request=number)))
    ):
        pulled = await supervisor.ask(
            make, m.Pulled, timeout_s=left_s, give_up=lambda number: m.EndPull(request=number)
        )
    here = set(pulled.ranges)
    ranges = [item for item in request.ranges if (item.start, sequence_key(item.sequence)) in here]
    return pb.PullReply(ranges=ranges, reason=pulled.reason)


async def _end_if_stuck(supervisor: Supervisor, until_s: float, end: Callable[[], None]) -> None:
    """Have the pull ended when its time is over, or nothing of it has arrived for too long."""
    moved, moved_at_s = -1, time.monotonic()
    while time.monotonic() < min(until_s, moved_at_s + STANDSTILL_S):
        progress = supervisor.progress
        if progress is not None and progress.moved != moved:
            moved, moved_at_s = progress.moved, time.monotonic()
        await asyncio.sleep(min(1.0, STANDSTILL_S / 4))
    end()


async def _lend(address: str, node: str, epoch: int, prepared: m.Prepared) -> pb.LendReply:
    request = pb.LendRequest(
        puller=node,
        epoch=epoch,
        protocol_version=PROTOCOL_VERSION,
        layout=prepared.layout.to_proto(),
        worker_address=prepared.worker_address,
        lane=prepared.lane,
        chunk_bytes=prepared.chunk_bytes,
    )
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = rpc.AttentionStub(channel)  # type: ignore[no-untyped-call]
            reply: pb.LendReply = await stub.Lend(request, timeout=_LEND_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        raise LenderGone(f"{address} lends nothing: {error.code().name} {error.details()}") from error
    return reply
