"""Passes over nodes of which a record says more, or less, than is true. Real etcd, as in test_fleet.py."""

import json
import sys
from pathlib import Path

import pytest
from flume_common.membership import Member, Role, State
from flume_controller.observe import Held
from flume_controller.reach import Answer

sys.path.insert(0, str(Path(__file__).parent))
from office import Office
from test_fleet import World


@pytest.fixture
async def world(store, keys):
    return World(store, keys, await Office.take(store, keys))


async def weight(world, *lanes, node="weight-1", state=None, **fields):
    """A weight node that has these lanes."""
    state = state or (State.READY if lanes else State.PREPARING)
    member = Member(
        id=node, role=Role.WEIGHT, state=state, address="x:2", host="here", pid=2, version="0",
        protocol_version=1, started_at_s=0, lanes=lanes, **fields,
    )  # fmt: skip
    await world.store.put(world.keys.member(Role.WEIGHT, node), member.encode())


async def serving(world, count):
    """As many nodes that are ready and reached."""
    await world.ready(count)
    await weight(world, *world.provider.known)
    await world.turn()
    assert (await world.status()).ready == count
    world.news()


async def test_a_ghost_counts_for_nothing_and_lets_no_node_go(world):
    await serving(world, 1)
    await world.register("ghost-real")
    for after_s in (0, 1, 9, 1, 60, 600):
        await world.turn(after_s=after_s)
    assert world.nodes.calls == [] and world.provider.stopped == []
    status = await world.status()
    assert (status.ready, status.unready["ghost-real"].state) == (1, "UNREACHABLE")
    assert (await world.condition("Available")).status == "True"
    assert "ghost-real" in (await world.degraded()).message


async def test_a_new_leader_is_not_taken_in_by_a_ghost_either(world):
    await serving(world, 1)
    await world.register("ghost-real")
    world.restart()
    await world.turn()
    assert world.nodes.calls == [] and (await world.status()).ready == 1


async def test_without_a_weight_node_a_ghost_is_known_by_calling_it(world):
    await world.ready(1)
    await world.register("ghost-real")
    world.nodes.holds = {"attention-1": Held(0, 0), "ghost-real": Held(0, 0, answer=Answer.OTHER)}
    await world.turn()
    assert world.nodes.calls == [] and list((await world.status()).unready) == ["ghost-real"]


async def test_a_ghost_that_drains_is_not_taken_back_in_the_place_of_a_node(world):
    await serving(world, 1)
    await world.register("ghost-real", State.DRAINING)
    await world.want(2, generation=3)
    await world.turn()
    assert world.nodes.calls == [] and len(world.provider.known) == 2


async def test_a_scale_down_lets_the_node_go_that_nobody_reaches(world):
    await serving(world, 2)
    await weight(world, "attention-2")
    await world.turn(after_s=1)
    await world.turn(after_s=10)
    assert "attention/attention-1 NodeUnreachable" in world.news()
    world.nodes.holds = {"attention-1": Held(500, 5), "attention-2": Held(0, 0)}
    await world.want(1, generation=3)
    await world.turn()
    assert world.provider.stopped == ["attention-1"] and world.nodes.calls == []


async def test_a_node_that_stays_without_a_lane_is_replaced(world):
    await serving(world, 2)
    await weight(world, "attention-2")
    await world.turn()
    await world.turn(after_s=59)
    assert len(world.provider.known) == 2 and (await world.status()).ready == 1
    await world.turn(after_s=1)
    assert len(world.provider.known) == 3 and world.provider.stopped == []
    await world.turn()
    assert world.provider.stopped == ["attention-1"], "as another one serves"


async def test_a_weight_node_that_reaches_nobody_makes_no_node_go(world):
    await serving(world, 2)
    await weight(world, reason="NoLane")
    for _ in range(8):
        await world.turn(after_s=30)
        for node in world.provider.known:
            await world.register(node)
    assert world.provider.stopped == [] and len(world.provider.known) == 3, "one try, not more"
    found = await world.condition("Available")
    assert (found.status, found.reason) == ("False", "NoLane")
    assert found.message == "weight-1 has no lane to an attention node"
    await weight(world, "attention-1", "attention-2")
    await world.turn()
    assert (await world.condition("Available")).status == "True"
    assert "fleet/attention Available" in world.news()


async def test_a_try_that_is_reached_takes_the_place_of_one_that_is_not(world):
    await serving(world, 1)
    await weight(world)
    await world.turn()
    await world.turn(after_s=60)
    assert set(world.provider.known) == {"attention-1", "attention-2"}
    await world.register("attention-2")
    await weight(world, "attention-2")
    await world.turn()
    assert world.provider.stopped == ["attention-1"]


async def test_while_etcd_fills_again_nothing_is_stopped(world):
    """All registrations lapsed; attention nodes are back before their weight node, and then it is."""
    await serving(world, 2)
    await world.lapse("attention-1")
    await world.store.delete(world.keys.member(Role.WEIGHT, "weight-1"))
    await world.turn(after_s=5)
    await world.register("attention-1")
    await world.turn(after_s=5)
    assert (await world.status()).ready == 2
    assert (await world.condition("Available")).reason == "NoWeightNode"
    await weight(world, state=State.PREPARING)
    await world.turn(after_s=1)
    await weight(world, "attention-1", "attention-2")
    await world.turn(after_s=1)
    assert world.provider.stopped == [] and world.nodes.calls == [] and len(world.provider.known) == 2


async def test_a_weight_node_that_is_another_at_its_address_says_nothing(world):
    await serving(world, 1)
    await weight(world, "ghost", node="weight-9")
    await world.register("ghost")
    world.nodes.weights = {"weight-9": Answer.OTHER}
    await world.turn(after_s=20)
    status = await world.status()
    assert status.ready == 1 and "ghost" in status.unready


async def router(world, node, canary=""):
    member = Member(
        id=node, role=Role.ROUTER, state=State.READY, address="x:3", host="here", pid=3, version="0",
        protocol_version=0, started_at_s=0, canary=canary,
    )  # fmt: skip
    await world.store.put(world.keys.member(Role.ROUTER, node), member.encode())


async def test_that_canaries_come_through_from_no_router_is_said(world):
    await serving(world, 1)
    await router(world, "router-1", "failed: weight-1: the engine is idle")
    await router(world, "router-2")
    await world.turn()
    assert (await world.condition("Available")).status == "True", "one of them gets through"
    await router(world, "router-2", "failed: weight-1: the engine is idle")
    await world.turn()
    found = await world.condition("Available")
    assert (found.status, found.reason) == ("False", "CanaryFailed") and "engine is idle" in found.message
    assert world.provider.stopped == []


BAD = [
    *(b"{", b"null", b"[]", b"{}", b"[" * 5000, b"x" * 1_000_000),
    *({"desired": -1}, {"desired": 2**70}, {"desired": None}, {"min": 9, "max": 1}, {"generation": -5}),
    *({"drained": "x"}, {"autoscale": 5}),
]


@pytest.mark.parametrize("restarted", [False, True], ids=["same leader", "new leader"])
async def test_a_spec_written_badly_by_hand_changes_nothing_and_is_said(world, restarted):
    await serving(world, 2)
    good = (await world.store.get(world.keys.spec_attention)).value
    for bad in BAD:
        value = bad if isinstance(bad, bytes) else json.dumps({**json.loads(good), **bad}).encode()
        await world.store.put(world.keys.spec_attention, value)
        if restarted:
            world.restart()
        await world.turn()
        degraded = await world.degraded()
        assert (degraded.status, degraded.reason) == ("True", "InvalidSpec"), bad
        assert "flumectl scale attention --replicas N" in degraded.message
        status = await world.status()
        assert (status.desired, status.ready) == (2, 2), bad
    assert world.nodes.calls == [] and world.provider.stopped == [] and len(world.provider.known) == 2
    assert "fleet/attention InvalidSpec" in world.news()
    await world.store.put(world.keys.spec_attention, good)
    await world.turn()
    assert (await world.degraded()).status == "False"
    assert world.news() == ["fleet/attention ValidSpec"]


async def test_a_spec_that_was_deleted_is_written_again(world):
    await serving(world, 2)
    await world.store.delete(world.keys.spec_attention)
    await world.turn()
    assert ((await world.spec()).desired, (await world.spec()).generation) == (2, 3)
    assert world.nodes.calls == [] and world.provider.stopped == []


async def test_with_a_bad_spec_a_node_that_crashed_is_still_made_good(world):
    await serving(world, 2)
    await world.store.put(world.keys.spec_attention, b"{")
    world.provider.crash("attention-1")
    await world.turn()
    assert [item.id for item in world.provider.known.values() if item.running] == [
        "attention-2", "attention-3",
    ]  # fmt: skip


async def test_with_neither_spec_nor_status_the_nodes_that_run_are_kept(world):
    await serving(world, 2)
    for key in (world.keys.spec_attention, world.keys.status_attention):
        await world.store.put(key, b"{")
    world.restart()
    await world.turn()
    assert world.nodes.calls == [] and world.provider.stopped == [] and (await world.status()).desired == 2


async def test_members_under_the_key_of_another_are_stepped_over(world):
    await serving(world, 1)
    kv = await world.store.get(world.keys.member(Role.ATTENTION, "attention-1"))
    await world.store.put(world.keys.member(Role.ATTENTION, "ghost"), kv.value)
    await world.store.put(
        world.keys.member(Role.ATTENTION, "bad"), json.dumps({**json.loads(kv.value), "id": "../x"}).encode()
    )
    await world.turn()
    assert (await world.status()).ready == 1 and world.nodes.calls == []
