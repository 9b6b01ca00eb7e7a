"""The supervisor's part in moving closed ranges: asks the node with room to pull them, batch by batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

import grpc
import structlog
from flume_common.engine_link import LinkClosed
from flume_common.membership import Member, Members, Role
from flume_common.serving import channel
from flume_protos.v1 import attention_pb2 as pb
from flume_protos.v1 import attention_pb2_grpc as rpc

from flume_weight import messages as m
from flume_weight.identity import Identity

log = structlog.get_logger()

_PULL_TIMEOUT_S = 600.0  # the target ends one that stands still


async def move_ranges(
    requests: asyncio.Queue[m.MoveRanges],
    members: Members,
    identity: Callable[[], Identity],
    answer: Callable[[m.RangesMoved], None],
) -> NoReturn:
    """Answer every request, in order. What could not be pulled stays where it was."""
    while True:
        request = await requests.get()
        listed = {member.id: member for member in members.of(Role.ATTENTION)}
        source, target = listed.get(request.source), listed.get(request.target)
        moved: list[m.MovedRange] = []
        if source is not None and target is not None:
            moved = await _pull(request, source, target, identity())
        with suppress(LinkClosed):  # whoever receives hears of it, too
            answer(m.RangesMoved(request.source, request.target, moved))


async def _pull(request: m.MoveRanges, source: Member, target: Member, ours: Identity) -> list[m.MovedRange]:
    ranges = [pb.PulledRange(sequence=r.sequence, start=r.start, tokens=r.tokens) for r in request.ranges]
    call = pb.PullRequest(
        weight_node=ours.node,
        epoch=ours.epoch,
        credentials=ours.credentials(),
        lender=source.id,
        lender_address=source.address,
        ranges=ranges,
    )
    try:
        # With keepalive: a target that is stopped or cut off is not waited for that long.
        async with channel(target.address) as opened:
            stub = rpc.AttentionStub(opened)  # type: ignore[no-untyped-call]
            reply: pb.PullReply = await stub.Pull(call, timeout=_PULL_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        log.warning("pull_failed", source=source.id, target=target.id, code=error.code().name,
                    reason=error.details())  # fmt: skip
        return []
    log.info("ranges_moved", source=source.id, target=target.id, asked=len(ranges),
             moved=len(reply.ranges), tokens=sum(item.tokens for item in reply.ranges))  # fmt: skip
    return [m.MovedRange(item.sequence, item.start, item.tokens) for item in reply.ranges]
