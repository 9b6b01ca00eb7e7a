"""The weight nodes that serve our model: a gRPC channel to each, kept in step with the members.

Level-triggered: at every change of membership the wanted nodes are compared with the connected ones.
A node becomes a candidate once it has answered Describe. One that leaves the membership keeps its
channel while sequences run there and for a while after: losing a lease ends no stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Protocol

import grpc
import structlog
from flume_common.backoff import Backoff
from flume_common.membership import Member, Role, State
from flume_common.tasks import background
from flume_protos.v1 import weight_pb2 as pb
from flume_protos.v1 import weight_pb2_grpc as rpc

from flume_router.errors import NoWeightNode
from flume_router.pick import Candidate, pick

log = structlog.get_logger(__name__)

_DESCRIBE_DEADLINE_S = 5.0
_SUSPECT_S = 5.0
_LINGER_S = 15.0
Connect = Callable[[str], AbstractAsyncContextManager[grpc.aio.Channel]]
Key = tuple[str, str, int]  # id, address, epoch


class MembersView(Protocol):
    """What the pool needs of `flume_common.membership.Members`."""

    def of(self, role: Role) -> Sequence[Member]: ...
    async def changed(self) -> None: ...


class WeightNode:
    """One node with its channel; `described` is None until it has answered."""

    def __init__(self, member: Member) -> None:
        self.id = member.id
        self.address = member.address
        self.stub: rpc.WeightStub | None = None
        self.described: pb.DescribeReply | None = None
        self.listed = True
        self.outstanding = 0
        self.retired = asyncio.Event()
        self._picked_at_s = 0.0
        self._suspect_until_s = 0.0

    def generate(
        self, request: pb.GenerateRequest, *, timeout_s: float, metadata: tuple[tuple[str, str], ...]
    ) -> grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateReply]:
        assert self.stub is not None, "a node is a candidate only once it has answered"
        call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateReply]
        call = self.stub.Generate(request, timeout=timeout_s, metadata=metadata)
        return call

    def suspect(self) -> None:
        """A call to it has just failed: others first, for a few seconds."""
        self._suspect_until_s = time.monotonic() + _SUSPECT_S

    def candidate(self, key: str) -> Candidate:
        suspect = time.monotonic() < self._suspect_until_s
        return Candidate(key, self.outstanding, self._picked_at_s, self.listed, suspect)

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Counts a sequence for as long as it runs."""
        self.outstanding += 1
        self._picked_at_s = time.monotonic()
        try:
            yield
        finally:
            self.outstanding -= 1


class WeightPool:
    """Made by `open_pool`."""

    def __init__(self, members: MembersView, connect: Connect, *, model: str, vocab_size: int) -> None:
        self.model = model
        self._members = members
        self._connect = connect
        self._vocab_size = vocab_size
        self._nodes: dict[Key, WeightNode] = {}
        self._moved = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether a member that is READY has answered Describe."""
        return any(node.listed and node.described for node in self._nodes.values())

    async def changed(self) -> None:
        """Returns at the next change of `ready` after the last call, or a little too often."""
        await self._moved.wait()
        self._moved.clear()

    @property
    def context_tokens(self) -> int:
        """The shortest context among the candidates. Raises NoWeightNode."""
        return min(described.context_tokens for described in self._descriptions())

    @property
    def vocab_size(self) -> int:
        """Ids a prompt may use. Raises NoWeightNode."""
        return min(described.vocab_size for described in self._descriptions())

    def _descriptions(self) -> list[pb.DescribeReply]:
        known = [node.described for node in self._nodes.values() if node.described is not None]
        if not known:
            raise NoWeightNode(self.model)
        return known

    @contextmanager
    def borrow(self, exclude: Collection[str] = ()) -> Iterator[WeightNode]:
        """A node for one sequence. `exclude`: ids not to take. Raises NoWeightNode."""
        nodes = {str(key): node for key, node in self._nodes.items() if node.described is not None}
        excluded = [key for key, node in nodes.items() if node.id in exclude]
        chosen = pick([node.candidate(key) for key, node in nodes.items()], excluded)
        if chosen is None:
            raise NoWeightNode(self.model)
        with nodes[chosen].one_more():
            yield nodes[chosen]

    async def run(self) -> None:
        """For ever; each connected node has a task that lives as long as its channel."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._adjust(tasks)
                self._moved.set()
                await self._members.changed()

    def _adjust(self, tasks: asyncio.TaskGroup) -> None:
        wanted = wanted_nodes(self._members.of(Role.WEIGHT), self.model)
        for key, node in self._nodes.items():
            if node.listed and key not in wanted:
                node.listed = False
                node.retired.set()
        for key, member in wanted.items():
            if key in self._nodes:
                self._nodes[key].listed = True
                self._nodes[key].retired.clear()
            else:
                self._nodes[key] = WeightNode(member)
                tasks.create_task(self._keep(key, self._nodes[key]), name=f"weight-node-{member.id}")

    async def _keep(self, key: Key, node: WeightNode) -> None:
        async with self._connect(node.address) as channel:
            node.stub = rpc.WeightStub(channel)  # type: ignore[no-untyped-call]
            async with background(describe=self._describe(node)):
                await self._until_unused(node)
            # Before the channel closes, so that nobody is given a node that cannot be called.
            del self._nodes[key]
        log.info("weight_node_disconnected", weight_node=node.id)

    async def _until_unused(self, node: WeightNode) -> None:
        while not node.retired.is_set() or node.outstanding:
            await node.retired.wait()
            await asyncio.sleep(_LINGER_S if node.described else 0)

    async def _describe(self, node: WeightNode) -> None:
        backoff = Backoff()
        while node.described is None:
            try:
                assert node.stub is not None
                described = await node.stub.Describe(pb.DescribeRequest(), timeout=_DESCRIBE_DEADLINE_S)
            except grpc.aio.AioRpcError as error:
                log.debug("weight_node_describe_failed", weight_node=node.id, code=error.code().name)
                await asyncio.sleep(backoff.next_s())
                continue
            if not self._fits(node, described):
                return
            node.described = described
            self._moved.set()
            log.info("weight_node_connected", weight_node=node.id, context_tokens=described.context_tokens)

    def _fits(self, node: WeightNode, described: pb.DescribeReply) -> bool:
        """A node whose vocabulary is smaller than our tokenizer's has another model than we have."""
        fits = described.vocab_size >= self._vocab_size and described.model == self.model
        if not fits:
            log.error(
                "weight_node_mismatch",
                weight_node=node.id,
                its_model=described.model,
                our_model=self.model,
                its_vocab_size=described.vocab_size,
                our_vocab_size=self._vocab_size,
            )
        return fits


def wanted_nodes(members: Sequence[Member], model: str) -> Mapping[Key, Member]:
    """The READY ones that serve `model`."""
    return {
        (member.id, member.address, member.epoch): member
        for member in members
        if member.state is State.READY and member.model == model
    }


@asynccontextmanager
async def open_pool(
    members: MembersView, connect: Connect, *, model: str, vocab_size: int
) -> AsyncIterator[WeightPool]:
    """`vocab_size` is our tokenizer's: a node with fewer tokens is not used."""
    pool = WeightPool(members, connect, model=model, vocab_size=vocab_size)
    async with background(weight_pool=pool.run()):
        yield pool
