"""The weight nodes that serve our model: a gRPC channel to each, kept in step with the members.

Level-triggered: at every change of membership the wanted nodes are compared with the connected ones.
A node becomes a candidate once it has answered Describe. One that leaves the membership keeps its
channel while sequences run there and for a while after: losing a lease ends no stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from typing import Protocol

import grpc
import structlog
from flume_common.backoff import Backoff
from flume_common.membership import Member, Role, State
from flume_common.reasons import Reason, sentence
from flume_common.tasks import background
from flume_protos.v1 import weight_pb2 as pb
from flume_protos.v1 import weight_pb2_grpc as rpc

from flume_router.canary import Canary
from flume_router.errors import NoWeightNode
from flume_router.pick import pick
from flume_router.prompts import ModelLimits
from flume_router.weight_node import WeightNode

log = structlog.get_logger(__name__)

_DESCRIBE_DEADLINE_S = 5.0
_LINGER_S = 15.0
Connect = Callable[[str], AbstractAsyncContextManager[grpc.aio.Channel]]
Key = tuple[str, str, int]  # id, address, epoch


class MembersView(Protocol):
    """What the pool needs of `flume_common.membership.Members`."""

    @property
    def connected(self) -> bool: ...
    def of(self, role: Role) -> Sequence[Member]: ...
    async def changed(self) -> None: ...


class WeightPool:
    """Made by `open_pool`."""

    def __init__(
        self,
        members: MembersView,
        connect: Connect,
        *,
        model: str,
        vocab_size: int,
        silence_s: float,
        standstill_s: float = 0.0,
    ) -> None:
        self.model = model
        self._silence_s = silence_s
        self._standstill_s = standstill_s
        self._members = members
        self._connect = connect
        self._vocab_size = vocab_size
        self.canary_interval_s = 0.0
        """As the setting says; 0: no canaries."""
        self._nodes: dict[Key, WeightNode] = {}
        self._moved = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether a member that is READY has answered Describe, and no canary shows otherwise."""
        return self.met and not self.canary_failure

    @property
    def met(self) -> bool:
        """Whether a member that is READY has answered Describe."""
        return bool(self._able())

    @property
    def canary_failure(self) -> str:
        """Why no canary comes through any weight node; empty while one does, or nothing is known."""
        able = self._able()
        if not able or not all(node.canary.failed for node in able):
            return ""
        return "; ".join(f"{node.id}: {node.canary.reason}" for node in able)

    @property
    def canaries(self) -> Mapping[str, Canary]:
        """What canaries through the nodes showed that can serve by their own word, by id."""
        return {node.id: node.canary for node in self._able()}

    def _able(self) -> list[WeightNode]:
        nodes = list(self._nodes.values())
        return [node for node in nodes if node.listed and node.described and not node.unable]

    @property
    def why_not(self) -> list[str]:
        """Of each weight node of our model, why no sequence may be sent there; one that can is left out."""
        ours = [member for member in self._members.of(Role.WEIGHT) if member.model == self.model]
        return [why for member in ours if (why := self._why_not(member))]

    def _why_not(self, member: Member) -> str:
        if member.state is State.PREPARING:
            return sentence(member.id, member.reason)
        if member.state is State.DRAINING:
            return f"{member.id} is draining"
        node = self._nodes.get(key_of(member))
        return node.why_not if node is not None else f"{member.id} has not answered yet"

    @property
    def store_connected(self) -> bool:
        """Whether the members are up to date; otherwise they are the last ones known."""
        return self._members.connected

    async def changed(self) -> None:
        """Returns at the next change of what this pool says, or a little too often. For any number."""
        await self._moved.wait()

    def _move(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    @property
    def context_tokens(self) -> int:
        """The shortest context among the candidates. Raises NoWeightNode."""
        return min(described.context_tokens for described in self._descriptions())

    @property
    def vocab_size(self) -> int:
        """Ids a prompt may use. Raises NoWeightNode."""
        return min(described.vocab_size for described in self._descriptions())

    @property
    def limits(self) -> ModelLimits:
        """What a request must keep to. Raises NoWeightNode."""
        return ModelLimits(self.context_tokens, self.vocab_size)

    @property
    def known_limits(self) -> ModelLimits | None:
        """The same; None while no weight node has said it."""
        return self.limits if self.known else None

    def _descriptions(self) -> list[pb.DescribeReply]:
        known = [node.described for node in self._nodes.values() if node.described is not None]
        if not known:
            raise NoWeightNode(self.model, self.why_not)
        return known

    @property
    def known(self) -> bool:
        """Whether a node that serves our model has ever answered and is not long gone."""
        return any(node.described for node in self._nodes.values())

    @property
    def preparing(self) -> bool:
        """Whether a node of our model loads it, perhaps again: there may be one to lend soon."""
        return any(
            member.state is State.PREPARING and member.reason == Reason.LOADING and member.model == self.model
            for member in self._members.of(Role.WEIGHT)
        )

    @property
    def lendable(self) -> bool:
        """Whether `borrow` has a node now."""
        return bool(self._lendable())

    @contextmanager
    def borrow(self) -> Iterator[WeightNode]:
        """A node for one sequence, of those that answer. Raises NoWeightNode."""
        nodes = self._lendable()
        chosen = pick(node.candidate(key) for key, node in nodes.items())
        if chosen is None:
            raise NoWeightNode(self.model, self.why_not)
        with nodes[chosen].one_more():
            yield nodes[chosen]

    def _lendable(self) -> dict[str, WeightNode]:
        return {str(key): node for key, node in self._nodes.items() if node.usable}

    def _has_others(self, key: Key) -> bool:
        return any(other != str(key) for other in self._lendable())

    async def run(self) -> None:
        """For ever; each connected node has a task that lives as long as its channel."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._adjust(tasks)
                self._move()
                await self._members.changed()

    def _adjust(self, tasks: asyncio.TaskGroup) -> None:
        members = self._members.of(Role.WEIGHT)
        wanted, unable = wanted_nodes(members, self.model), unable_nodes(members, self.model)
        for key, node in self._nodes.items():
            node.listed, node.unable = key in wanted, unable.get((node.id, node.address), "")
            if node.listed or node.unable:  # one that is unable is likely to be back
                node.retired.clear()
            else:
                node.retired.set()
        for key, member in wanted.items():
            if key not in self._nodes:
                self._nodes[key] = WeightNode(
                    member,
                    silence_s=self._silence_s,
                    changed=self._move,
                    elsewhere=partial(self._has_others, key),
                    standstill_s=self._standstill_s,
                    canary_interval_s=lambda: self.canary_interval_s,
                )
                tasks.create_task(self._keep(key, self._nodes[key]), name=f"weight-node-{member.id}")

    async def _keep(self, key: Key, node: WeightNode) -> None:
        async with self._connect(node.address) as channel:
            node.stub = rpc.WeightStub(channel)  # type: ignore[no-untyped-call]
            async with background(meet=self._meet(node)):
                await self._until_unused(node)
            # Before the channel closes, so that nobody is given a node that cannot be called.
            del self._nodes[key]
        log.info("weight_node_disconnected", weight_node=node.id)

    async def _until_unused(self, node: WeightNode) -> None:
        while not node.retired.is_set() or node.outstanding:
            await node.retired.wait()
            await asyncio.sleep(_LINGER_S if node.described else 0)

    async def _meet(self, node: WeightNode) -> None:
        if await self._describe(node):
            assert node.stub is not None
            async with background(canary=node.canary.run(node.stub)):
                await node.keep_asking()

    async def _describe(self, node: WeightNode) -> bool:
        """False: it can't be used."""
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
                return False
            node.described = described
            self._move()
            log.info("weight_node_connected", weight_node=node.id, context_tokens=described.context_tokens)
        return True

    def _fits(self, node: WeightNode, described: pb.DescribeReply) -> bool:
        """A node whose vocabulary is smaller than our tokenizer's has another model than we have.

        One of another name answers at an address that is not its record's to give.
        """
        same = described.model == self.model and described.node in ("", node.id)
        fits = same and described.vocab_size >= self._vocab_size
        if not fits:
            log.error(
                "weight_node_mismatch",
                weight_node=node.id,
                its_name=described.node,
                its_model=described.model,
                our_model=self.model,
                its_vocab_size=described.vocab_size,
                our_vocab_size=self._vocab_size,
            )
        return fits


def wanted_nodes(members: Sequence[Member], model: str) -> Mapping[Key, Member]:
    """The READY ones that serve `model`."""
    return {
        key_of(member): member for member in members if member.state is State.READY and member.model == model
    }


def unable_nodes(members: Sequence[Member], model: str) -> Mapping[tuple[str, str], str]:
    """Why those cannot serve that say so themselves, by id and address."""
    return {
        (member.id, member.address): sentence(member.id, member.reason)
        for member in members
        if member.state is State.PREPARING and member.model == model
    }


def key_of(member: Member) -> Key:
    """What tells one life of a weight node from another."""
    return member.id, member.address, member.epoch


@asynccontextmanager
async def open_pool(
    members: MembersView,
    connect: Connect,
    *,
    model: str,
    vocab_size: int,
    silence_s: float,
    standstill_s: float = 0.0,
) -> AsyncIterator[WeightPool]:
    """`vocab_size` is our tokenizer's: a node with fewer tokens is not used.

    `silence_s`: after this long without a sign of work, a node's sequences go on elsewhere; where there is
    no other node they wait for it, for `standstill_s`.
    """
    pool = WeightPool(
        members,
        connect,
        model=model,
        vocab_size=vocab_size,
        silence_s=silence_s,
        standstill_s=standstill_s,
    )
    async with background(weight_pool=pool.run()):
        yield pool
