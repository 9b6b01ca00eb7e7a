"""A pull as the supervisor conducts it: ask the own engine, then the lender's node, then let them read."""

from __future__ import annotations

import time

import grpc
from flume_common.wire import PROTOCOL_VERSION, sequence_key
from flume_protos.v1 import attention_pb2 as pb
from flume_protos.v1 import attention_pb2_grpc as rpc

from flume_attention import messages as m
from flume_attention.errors import LenderGone
from flume_attention.supervisor import Supervisor

PULL_TIMEOUT_S = 60.0  # where the caller names none
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

    Raises EngineGone, AttachRefused and LenderGone.
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
    pulled = await supervisor.ask(
        lambda number: m.Pull(
            request=number,
            weight_node=request.weight_node,
            epoch=weight_epoch,
            lender=request.lender,
            lender_epoch=lent.epoch,
            lender_worker_address=lent.worker_address,
            lender_lane=lent.lane,
            lane=prepared.lane,
            ranges=[(item.sequence, item.start, item.tokens) for item in request.ranges],
            node_epoch=epoch,
        ),
        m.Pulled,
        timeout_s=max(0.0, until_s - time.monotonic()),
        give_up=lambda number: m.EndPull(request=number),
    )
    here = set(pulled.ranges)
    ranges = [item for item in request.ranges if (item.start, sequence_key(item.sequence)) in here]
    return pb.PullReply(ranges=ranges, reason=pulled.reason)


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
