"""One pass at a time over real etcd, with a fake provider, fake node calls and a clock of the test's."""

import itertools
from dataclasses import replace

import grpc
import pytest
from flume_common.membership import Member, Role, State
from flume_controller.fleet import ActionsFailed, AttentionFleet
from flume_controller.observe import Held, Patience
from flume_controller.providers.base import Instance
from flume_controller.spec import AttentionSpec, decode_status, encode


class FakeProvider:
    """Processes that run because the list says so."""

    def __init__(self, clock):
        self.clock = clock
        self.known = {}
        self.pids = itertools.count(1)
        self.stopped = []
        self.before_listing = None
        self.error = None

    async def instances(self):
        if self.before_listing:
            await self.before_listing()
        return list(self.known.values())

    async def start(self, node):
        if self.error:
            raise self.error
        self.known[node] = Instance(node, pid=next(self.pids), started_at_s=self.clock())

    async def stop(self, node):
        self.stopped.append(node)
        self.known[node] = replace(self.known[node], stopping=True)

    async def forget(self, node):
        del self.known[node]

    def crash(self, node):
        self.known[node] = replace(self.known[node], running=False, exit_code=1)


class FakeNodes:
    """Node calls: `holds` is what nodes answer; drains and undrains are recorded."""

    def __init__(self):
        self.holds = {}
        self.calls = []
        self.error = None

    async def held(self, members):
        return {m.id: self.holds[m.id] for m in members if m.id in self.holds}

    async def drain(self, member):
        if self.error:
            raise self.error
        self.calls.append(("drain", member.id))

    async def undrain(self, member):
        self.calls.append(("undrain", member.id))


class World:
    """A fleet and everything around it."""

    def __init__(self, store, keys):
        self.store, self.keys = store, keys
        self.now_s = 1000.0
        self.provider = FakeProvider(self.clock)
        self.nodes = FakeNodes()
        self.restart()

    def clock(self):
        return self.now_s

    def restart(self):
        """A new controller over the same world."""
        self.fleet = AttentionFleet(
            self.store, self.keys, self.provider, self.nodes, AttentionSpec(desired=1),
            patience=Patience(start_s=100, lost_s=30), clock=self.clock,
        )  # fmt: skip

    async def want(self, desired, generation=2):
        await self.store.put(
            self.keys.spec_attention, encode(AttentionSpec(desired=desired, generation=generation))
        )

    async def register(self, node, state=State.READY, **values):
        member = Member(
            id=node, role=Role.ATTENTION, state=state, address="x:1", host="here", pid=1, version="0",
            protocol_version=1, started_at_s=0, **values,
        )  # fmt: skip
        await self.store.put(self.keys.member(Role.ATTENTION, node), member.encode())

    async def lapse(self, node):
        await self.store.delete(self.keys.member(Role.ATTENTION, node))

    async def turn(self, after_s=1.0):
        """Time passes, then one pass."""
        self.now_s += after_s
        return await self.fleet.reconcile()

    async def ready(self, count):
        """As many nodes started and registered."""
        await self.want(count)
        await self.turn()
        for node in self.provider.known:
            await self.register(node)
        await self.turn()

    async def status(self):
        return decode_status((await self.store.get(self.keys.status_attention)).value)

    async def degraded(self):
        return next(item for item in (await self.status()).conditions if item.type == "Degraded")


@pytest.fixture
def world(store, keys):
    return World(store, keys)


async def test_the_first_pass_creates_the_spec_and_starts_what_it_says(world):
    await world.turn()
    assert list(world.provider.known) == ["attention-1"]
    status = await world.status()
    assert (status.observed_generation, status.desired, status.ready) == (1, 1, 0)


async def test_passes_that_find_nothing_new_write_nothing(world):
    await world.ready(2)
    before = (await world.store.get(world.keys.status_attention)).mod_revision
    for _ in range(3):
        await world.turn()
    assert (await world.store.get(world.keys.status_attention)).mod_revision == before


async def test_a_process_that_never_registers_is_stopped_and_replaced(world):
    await world.turn()
    await world.turn(after_s=98)
    assert world.provider.stopped == []
    await world.turn(after_s=2)
    assert world.provider.stopped == ["attention-1"]
    assert set(world.provider.known) == {"attention-1", "attention-2"}


async def test_a_node_whose_registration_lapsed_is_waited_for_before_it_is_replaced(world):
    await world.ready(1)
    world.now_s += 500
    await world.turn()
    await world.lapse("attention-1")
    await world.turn(after_s=29)
    assert world.provider.stopped == [] and len(world.provider.known) == 1
    assert (await world.degraded()).reason == "NodeUnreachable"
    await world.turn(after_s=2)
    assert world.provider.stopped == ["attention-1"]


async def test_a_restarted_controller_waits_for_old_nodes_that_are_not_registered(world):
    """etcd was away, leases ran out, and the controller was restarted: the KV is still there."""
    await world.ready(2)
    world.now_s += 500
    await world.lapse("attention-1")
    await world.lapse("attention-2")
    world.restart()
    await world.want(1, generation=3)
    await world.turn()
    assert world.provider.stopped == [] and len(world.provider.known) == 2
    await world.register("attention-1")
    await world.register("attention-2")
    await world.turn()
    assert world.provider.stopped == [] and world.nodes.calls == [("drain", "attention-2")]


async def test_a_process_that_registered_since_the_members_were_read_is_not_stopped(world):
    await world.want(1)
    await world.turn()
    await world.want(0, generation=3)

    async def register():
        await world.register("attention-1")

    world.provider.before_listing = register
    await world.turn()
    assert world.provider.stopped == []
    await world.turn()
    assert world.nodes.calls == [("drain", "attention-1")]


async def test_an_empty_draining_node_is_stopped_and_the_next_pass_comes_soon_meanwhile(world):
    await world.ready(2)
    await world.register("attention-2", State.DRAINING)
    await world.want(1, generation=3)
    world.nodes.holds = {"attention-2": Held(5, 1)}
    assert await world.turn() < 1, "only asking shows that it has become empty"
    assert world.provider.stopped == []
    world.nodes.holds = {"attention-2": Held(0, 0, safe_to_delete=True)}
    await world.turn()
    assert world.provider.stopped == ["attention-2"]


async def test_an_id_is_free_again_only_when_its_registration_is_gone(world):
    await world.ready(1)
    world.provider.crash("attention-1")
    await world.turn()
    assert set(world.provider.known) == {"attention-1", "attention-2"}
    await world.register("attention-2")
    await world.lapse("attention-1")
    await world.want(2, generation=3)
    await world.turn()
    assert world.provider.known["attention-1"].running


async def test_an_id_that_somebody_else_registered_is_not_given_to_a_new_process(world):
    await world.register("attention-1")
    await world.want(2)
    await world.turn()
    assert list(world.provider.known) == ["attention-2"]


async def test_crash_after_crash_is_answered_ever_more_slowly(world):
    await world.turn()
    for expected_wait_s in (0, 0.5, 1.0, 2.0):
        (node,) = [item.id for item in world.provider.known.values() if item.running]
        world.provider.crash(node)
        wish_s = await world.turn(after_s=0.01)
        if expected_wait_s:
            assert world.provider.known == {}
            assert wish_s == pytest.approx(expected_wait_s)
            await world.turn(after_s=expected_wait_s)
        assert len(world.provider.known) == 1
    assert "4 times so far" in (await world.degraded()).message


async def test_an_action_that_fails_is_reported_and_the_others_are_done(world):
    await world.ready(2)
    world.nodes.error = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "gone away"
    )
    await world.register("attention-3", State.DRAINING)
    world.provider.known["attention-3"] = Instance("attention-3", 9, world.now_s)
    world.nodes.holds = {"attention-3": Held(0, 0, safe_to_delete=True)}
    await world.want(1, generation=3)
    with pytest.raises(ActionsFailed, match="UNAVAILABLE: gone away"):
        await world.turn()
    assert world.provider.stopped == ["attention-3"]
    assert (await world.degraded()).reason == "ActionFailed"
    world.nodes.error = None
    await world.turn()
    assert world.nodes.calls == [("drain", "attention-2")]


async def test_a_command_that_cannot_be_run_is_reported(world):
    world.provider.error = FileNotFoundError("no such program: numactl")
    with pytest.raises(ActionsFailed, match="numactl"):
        await world.turn()
    assert "numactl" in (await world.degraded()).message


async def test_a_member_and_a_status_nobody_can_read_are_stepped_over(world):
    await world.store.put(world.keys.member(Role.ATTENTION, "attention-7"), b"not json")
    await world.store.put(world.keys.status_attention, b'{"from": "elsewhere"}')
    await world.turn()
    assert list(world.provider.known) == ["attention-1"]
    assert (await world.status()).desired == 1
