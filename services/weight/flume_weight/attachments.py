"""Keeps a lane to every attention node that is listed. Level-triggered: every pass looks again.

A lane belongs to a process, not to a lease: a node that lost its lease and registered again keeps its lane,
a node that was restarted gets a new one. A record is only a claim: one that names another process ends no
lane that works before that process has answered, and under the node's name. Where we lost our own lease, or
the cluster has another incarnation, the nodes are told our new epoch; others may have had our lanes ended
meanwhile as those of one that is over, and whether they have is the answer. A node that is no longer listed
is given a grace time, since a lost lease is no proof of death; a dead process takes its lane down much
sooner.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import grpc
import structlog
from flume_common.layout import KvLayout
from flume_common.membership import Member, Members, Role, State
from flume_common.wire import PROTOCOL_VERSION
from flume_protos.v1 import attention_pb2 as pb
from flume_protos.v1 import attention_pb2_grpc as rpc

from flume_weight import messages as m
from flume_weight.identity import Identity

log = structlog.get_logger()

_LANES_AHEAD = 2  # a node that comes need not wait for the engine to end its step
_UNLISTED_GRACE_S = 5.0
_NEW_INCARNATION_GRACE_S = 30.0
_ATTACH_TIMEOUT_S = 5.0
_ADOPT_TIMEOUT_S = 1.0
_KEPT_TIMEOUT_S = 2.0
_KEPT_RETRY_S = 0.05
_DETACH_TIMEOUT_S = 1.0
_RENEW_TIMEOUT_S = 1.0
_RETRY_S = (0.1, 0.2, 0.5, 1.0, 2.0)
_PASS_S = 1.0  # a node that does not answer holds up neither the others nor what is said of their lanes
_LASTS_S = 5.0
"""A lane that was lost sooner is set up again after a pause, ever longer ones where that repeats itself:
over gRPC a node may answer while nothing comes through between the engines."""


@dataclass(slots=True)
class Attachment:
    """One node's lane, or the attempts at one."""

    process: tuple[str, int]  # address and pid: what a lane belongs to
    up: bool = False
    up_at_s: float = 0.0
    life: int = 0  # number of that of ours under which the node is known to have this lane
    draining: bool = False
    evacuating: bool = False
    failures: int = 0
    retry_at_s: float = 0.0
    unlisted_since_s: float | None = None


class Attachments:
    """One pass is `reconcile`; whoever owns it calls that on every change and now and then."""

    def __init__(
        self, ready: m.Ready, send: Callable[[m.Inbound], None], identity: Callable[[], Identity]
    ) -> None:
        self._ready = ready
        self._send = send
        self._identity = identity
        self._ordinal = identity().life.ordinal
        self._new_incarnation_at_s = float("-inf")
        self._lanes: asyncio.Queue[m.LaneOpen] = asyncio.Queue()
        self._nodes: dict[str, Attachment] = {}
        self._attaching: dict[str, asyncio.Task[None]] = {}
        for _ in range(_LANES_AHEAD):
            send(m.OpenLane())

    @property
    def up(self) -> list[str]:
        # A copy, as metrics ask from another thread.
        return sorted(node for node, attachment in list(self._nodes.items()) if attachment.up)

    @property
    def up_draining(self) -> list[str]:
        """Those of `up` that take no new tails."""
        return [node for node in self.up if self._nodes[node].draining]

    def opened(self, lane: m.LaneOpen) -> None:
        """The engine is ready for another lane."""
        self._lanes.put_nowait(lane)

    def lost(self, node: str) -> None:
        """The engine closed this lane; the next pass sets up another if the node is still listed."""
        attachment = self._nodes.get(node)
        if attachment is None or not attachment.up:
            return
        attachment.up = False
        if time.monotonic() - attachment.up_at_s >= _LASTS_S:
            attachment.failures = 0
        else:
            _delay(attachment)

    async def reconcile(self, members: Iterable[Member]) -> None:
        """Attach what is listed and not attached, detach what has been gone for a while."""
        listed = {member.id: member for member in members if member.state is not State.PREPARING}
        self._forget_unlisted(listed)
        await asyncio.gather(*(self._confirm(member) for member in listed.values() if self._in_doubt(member)))
        for member in listed.values():
            if self._is_due(member) and member.id not in self._attaching:
                self._attaching[member.id] = asyncio.create_task(self._attach(member))
        if self._attaching:
            await asyncio.wait(self._attaching.values(), timeout=_PASS_S)
        for node in [node for node, task in self._attaching.items() if task.done()]:
            self._attaching.pop(node).result()
        for member in listed.values():
            self._tell_draining(member)

    def close(self) -> None:
        """The engine is gone: nothing that is still being attached has an end here."""
        for task in self._attaching.values():
            task.cancel()

    async def kept(self, sequence: str, lost_node: str, members: Members) -> list[m.KeptRange]:
        """Ask every node what it keeps of a sequence that another weight node, `lost_node`, left.

        Nodes that are being attached just now, or have not noticed yet that the other one is gone, are
        waited for a little. What is not answered is computed again.
        """
        deadline_s = time.monotonic() + _KEPT_TIMEOUT_S
        while True:
            listed = [member for member in members.of(Role.ATTENTION) if member.state is not State.PREPARING]
            ours = self._identity()
            request = pb.AdoptRequest(
                weight_node=ours.node, epoch=ours.epoch, credentials=ours.credentials(), sequence=sequence,
                lost_node=lost_node, lost_below=members.over_below(Role.WEIGHT, lost_node),
            )  # fmt: skip
            replies = await asyncio.gather(*(self._ask_kept(member, request) for member in listed))
            if not any(reply is None or reply.in_use for reply in replies) or time.monotonic() >= deadline_s:
                break
            await asyncio.sleep(_KEPT_RETRY_S)
        return [
            m.KeptRange(member.id, item.start, item.tokens)
            for member, reply in zip(listed, replies, strict=True)
            for item in (reply.ranges if reply else ())
        ]

    async def _ask_kept(self, member: Member, request: pb.AdoptRequest) -> pb.AdoptReply | None:
        """None while the first attempt at a lane lasts, without which nothing can be taken over."""
        attachment = self._nodes.get(member.id)
        if attachment is None or not attachment.up:
            return None if attachment is None or not attachment.failures else pb.AdoptReply()
        try:
            async with grpc.aio.insecure_channel(member.address) as channel:
                stub = rpc.AttentionStub(channel)  # type: ignore[no-untyped-call]
                reply: pb.AdoptReply = await stub.Adopt(request, timeout=_ADOPT_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            log.warning("adopt_failed", attention_node=member.id, code=error.code().name,
                        reason=error.details())  # fmt: skip
            return pb.AdoptReply()
        return reply

    def _forget_unlisted(self, listed: dict[str, Member]) -> None:
        now = time.monotonic()
        grace_s = self._grace_s(now)
        if not self._identity().registered:
            return  # where not even we are listed, that others are not says nothing
        for node, attachment in list(self._nodes.items()):
            if node in listed:
                attachment.unlisted_since_s = None
                continue
            attachment.unlisted_since_s = attachment.unlisted_since_s or now
            if not attachment.up or now - attachment.unlisted_since_s > grace_s:
                self._send(m.Detach(node, "no longer listed"))
                del self._nodes[node]

    def _grace_s(self, now_s: float) -> float:
        """A new incarnation begins with nobody listed: all have to register again, and some may be slow."""
        if (ordinal := self._identity().life.ordinal) != self._ordinal:
            self._ordinal, self._new_incarnation_at_s = ordinal, now_s
        fresh = now_s - self._new_incarnation_at_s < _NEW_INCARNATION_GRACE_S
        return _NEW_INCARNATION_GRACE_S if fresh else _UNLISTED_GRACE_S

    def _is_due(self, member: Member) -> bool:
        process = (member.address, member.pid)
        attachment = self._nodes.get(member.id)
        if attachment is None or (attachment.process != process and not attachment.up):
            self._nodes[member.id] = attachment = Attachment(process)
        wanted = not attachment.up or attachment.process != process
        return wanted and time.monotonic() >= attachment.retry_at_s

    def _in_doubt(self, member: Member) -> bool:
        attachment = self._nodes.get(member.id)
        return attachment is not None and attachment.up and attachment.life != self._identity().life.number

    async def _confirm(self, member: Member) -> None:
        """Have our lane be of our present epoch. The next pass tries again."""
        attachment, ours = self._nodes[member.id], self._identity()
        request = pb.RenewRequest(weight_node=ours.node, epoch=ours.epoch, credentials=ours.credentials())
        try:
            async with grpc.aio.insecure_channel(member.address) as channel:
                stub = rpc.AttentionStub(channel)  # type: ignore[no-untyped-call]
                reply: pb.RenewReply = await stub.Renew(request, timeout=_RENEW_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            log.info("lane_not_renewed", attention_node=member.id, code=error.code().name,
                     reason=error.details())  # fmt: skip
            return
        if not attachment.up:
            return  # lost meanwhile
        if not reply.attached:
            log.warning("lane_ended_by_node", attention_node=member.id, epoch=ours.epoch)
            attachment.up = False
            self._send(m.Detach(member.id, "it has no lane of ours any more"))
        else:
            attachment.life = ours.life.number

    async def _attach(self, member: Member) -> None:
        attachment, identity = self._nodes[member.id], self._identity()
        try:
            async with asyncio.timeout(_ATTACH_TIMEOUT_S):
                ours = await self._lanes.get()
        except TimeoutError:
            return  # the engine is in a long step; the next pass tries again
        self._send(m.OpenLane())
        try:
            reply = await self._call(member, ours, identity)
        except grpc.aio.AioRpcError as error:
            self._send(m.CloseLane(ours.lane))
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:  # it works, and nothing has failed
                attachment.retry_at_s = time.monotonic() + _RETRY_S[0]
                log.info("attach_takes_long", attention_node=member.id, reason=error.details())
                return
            delay_s = _delay(attachment)
            log.warning("attach_failed", attention_node=member.id, code=error.code().name,
                        reason=error.details(), retry_s=delay_s)  # fmt: skip
            return
        if self._nodes.get(member.id) is not attachment:  # no longer listed, or another process by now
            self._send(m.CloseLane(ours.lane))
            return
        if reply.node != member.id:
            self._send(m.CloseLane(ours.lane))
            log.warning("attach_failed", attention_node=member.id, code="FAILED_PRECONDITION",
                        reason=f"{member.address} is {reply.node}", retry_s=_delay(attachment))  # fmt: skip
            return
        attachment.process = (member.address, member.pid)
        attachment.up, attachment.up_at_s, attachment.life = True, time.monotonic(), identity.life.number
        attachment.draining = attachment.evacuating = False
        self._send(
            m.Attach(
                node=member.id,
                worker_address=reply.worker_address,
                send_lane=reply.lane,
                receive_lane=ours.lane,
                capacity_blocks=reply.capacity_blocks,
                epoch=reply.epoch,
                direct_region=reply.direct_region,
            )
        )

    async def _call(self, member: Member, ours: m.LaneOpen, identity: Identity) -> pb.AttachReply:
        ready = self._ready
        request = pb.AttachRequest(
            weight_node=identity.node,
            epoch=identity.epoch,
            credentials=identity.credentials(),
            protocol_version=PROTOCOL_VERSION,
            layout=layout_of(ready).to_proto(),
            worker_address=ours.worker_address,
            lane=ours.lane,
            max_step_tokens=ready.max_step_tokens,
            max_step_sequences=ready.max_step_sequences,
            kv_frame_bytes=ready.kv_frame_bytes,
            direct=ready.direct,
            node=member.id,
        )
        async with grpc.aio.insecure_channel(member.address) as channel:
            stub = rpc.AttentionStub(channel)  # type: ignore[no-untyped-call]
            reply: pb.AttachReply = await stub.Attach(request, timeout=_ATTACH_TIMEOUT_S)
        return reply

    def _tell_draining(self, member: Member) -> None:
        attachment = self._nodes[member.id]
        draining = member.state is State.DRAINING
        evacuating = draining and member.leave_by_s > 0
        if attachment.up and (attachment.draining, attachment.evacuating) != (draining, evacuating):
            attachment.draining, attachment.evacuating = draining, evacuating
            self._send(m.NodeDraining(member.id, draining, evacuating))


def _delay(attachment: Attachment) -> float:
    """Note a failure; how many seconds the next attempt has to wait."""
    delay_s = _RETRY_S[min(attachment.failures, len(_RETRY_S) - 1)]
    attachment.failures += 1
    attachment.retry_at_s = time.monotonic() + delay_s
    return delay_s


async def detach(members: Iterable[Member], ours: Identity) -> None:
    """Tell every attention node to free what it holds for us; one that does not answer finds out itself."""
    request = pb.DetachRequest(weight_node=ours.node, epoch=ours.epoch, credentials=ours.credentials())

    async def tell(member: Member) -> None:
        with suppress(grpc.aio.AioRpcError):
            async with grpc.aio.insecure_channel(member.address) as channel:
                stub = rpc.AttentionStub(channel)  # type: ignore[no-untyped-call]
                await stub.Detach(request, timeout=_DETACH_TIMEOUT_S)

    await asyncio.gather(*(tell(member) for member in members))


def layout_of(ready: m.Ready) -> KvLayout:
    """The KV layout of the engine's model."""
    return KvLayout(
        num_layers=ready.num_layers,
        num_query_heads=ready.num_query_heads,
        num_kv_heads=ready.num_kv_heads,
        head_dim=ready.head_dim,
        dtype=ready.dtype,
        block_tokens=ready.block_tokens,
    )
