"""Calls to attention and weight nodes: what they hold, drain, undrain. One kept channel per address."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import grpc
from flume_common.membership import Member
from flume_protos.v1 import attention_pb2, attention_pb2_grpc, weight_pb2, weight_pb2_grpc

from flume_controller.observe import Held
from flume_controller.reach import Answer

STATS_DEADLINE_S = 0.5
LIST_DEADLINE_S = 2.0
"""For a list that a person asked for: worth waiting for a busy node."""
CALL_DEADLINE_S = 3.0


class Nodes(Protocol):
    """What a pass asks of nodes."""

    async def held(self, members: Iterable[Member]) -> dict[str, Held]:
        """What each attention node holds, by id; a node that does not answer in time is left out."""

    async def answers(self, weights: Iterable[Member]) -> dict[str, Answer]:
        """What calling each of these weight nodes shows, by id."""

    async def drain(self, member: Member, deadline_s: float = 0.0) -> None:
        """`deadline_s`: from now; 0: none."""

    async def undrain(self, member: Member) -> None: ...


class GrpcNodes:
    """`Nodes` over gRPC. Make it with `node_calls`."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def held(self, members: Iterable[Member]) -> dict[str, Held]:
        asked = list(members)
        answers = await asyncio.gather(*(self._held(member) for member in asked))
        return {m.id: held for m, held in zip(asked, answers, strict=True) if held is not None}

    async def answers(self, weights: Iterable[Member]) -> dict[str, Answer]:
        asked = list(weights)
        found = await asyncio.gather(*(self._answer(member) for member in asked))
        return {member.id: answer for member, answer in zip(asked, found, strict=True)}

    async def drain(self, member: Member, deadline_s: float = 0.0) -> None:
        request = attention_pb2.DrainRequest(deadline_s=deadline_s, node=member.id)
        await self._attention(member).Drain(request, timeout=CALL_DEADLINE_S)

    async def undrain(self, member: Member) -> None:
        request = attention_pb2.UndrainRequest(node=member.id)
        await self._attention(member).Undrain(request, timeout=CALL_DEADLINE_S)

    async def stats(self, member: Member) -> attention_pb2.StatsReply | None:
        """What an attention node says of itself; None when it does not answer in time."""
        request = attention_pb2.StatsRequest()
        try:
            reply: attention_pb2.StatsReply = await self._attention(member).Stats(
                request, timeout=STATS_DEADLINE_S
            )
        except grpc.aio.AioRpcError:
            return None
        return reply

    async def sequences(self, member: Member) -> list[weight_pb2.SequenceInfo] | None:
        """The live sequences of a weight node; None, which is not "none", if it does not answer in time."""
        stub = weight_pb2_grpc.WeightStub(self._channel(member))  # type: ignore[no-untyped-call]
        try:
            reply = await stub.ListSequences(weight_pb2.ListSequencesRequest(), timeout=LIST_DEADLINE_S)
        except grpc.aio.AioRpcError:
            return None
        return list(reply.sequences)

    async def activity(self, member: Member) -> weight_pb2.WeightStatusReply | None:
        """What a weight node is doing; None when its supervisor does not answer in time."""
        stub = weight_pb2_grpc.WeightStub(self._channel(member))  # type: ignore[no-untyped-call]
        try:
            reply: weight_pb2.WeightStatusReply = await stub.Status(
                weight_pb2.WeightStatusRequest(), timeout=STATS_DEADLINE_S
            )
        except grpc.aio.AioRpcError:
            return None
        return reply

    async def keep_only(self, addresses: Iterable[str]) -> None:
        """Close channels to nodes that are gone."""
        for address in self._channels.keys() - set(addresses):
            # With a grace, as closing a channel under a call cancels whoever awaits that call.
            await self._channels.pop(address).close(CALL_DEADLINE_S)

    async def close(self) -> None:
        await self.keep_only(())

    async def _held(self, member: Member) -> Held | None:
        request = attention_pb2.StatsRequest()
        try:
            stats = await self._attention(member).Stats(request, timeout=STATS_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            # Nothing listens there any more: its record is the last word. Slowness alone is not enough.
            gone = error.code() is grpc.StatusCode.UNAVAILABLE
            return Held.of_member(member) if gone else None
        if stats.node not in ("", member.id):
            return Held(0, 0, answer=Answer.OTHER)
        return Held(stats.used_tokens, sum(lane.sequences for lane in stats.lanes), stats.safe_to_delete)

    async def _answer(self, member: Member) -> Answer:
        stub = weight_pb2_grpc.WeightStub(self._channel(member))  # type: ignore[no-untyped-call]
        try:
            reply = await stub.Describe(weight_pb2.DescribeRequest(), timeout=STATS_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            return Answer.REFUSED if error.code() is grpc.StatusCode.UNAVAILABLE else Answer.SILENT
        return Answer.YES if reply.node in ("", member.id) else Answer.OTHER

    def _attention(self, member: Member) -> Any:
        return attention_pb2_grpc.AttentionStub(self._channel(member))  # type: ignore[no-untyped-call]

    def _channel(self, member: Member) -> grpc.aio.Channel:
        if member.address not in self._channels:
            self._channels[member.address] = grpc.aio.insecure_channel(member.address)
        return self._channels[member.address]


@asynccontextmanager
async def node_calls() -> AsyncIterator[GrpcNodes]:
    nodes = GrpcNodes()
    try:
        yield nodes
    finally:
        await nodes.close()
