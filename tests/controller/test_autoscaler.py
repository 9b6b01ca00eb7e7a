"""The autoscaler's loop: real etcd, nodes that say what the test wants, a clock of the test's."""

import sys
from pathlib import Path

import msgspec
import pytest
from flume_common.autoscale import Settings
from flume_common.election import Deposed
from flume_common.membership import Member, Role, State
from flume_common.read_speed import ReadSums
from flume_controller import desired
from flume_controller.autoscaler import Autoscaler, bounded
from flume_controller.load import Pace, Reading, Readings, node_loads, rest_s, waiting_tokens
from flume_controller.spec import Actor, AttentionSpec, Autoscale
from flume_protos.v1 import attention_pb2, common_pb2, weight_pb2

sys.path.insert(0, str(Path(__file__).parent))
from office import Office

ON = Autoscale(enabled=True, min=1, max=4)


def member(role, id, state=State.READY, **fields):
    return Member(
        id=id, role=role, state=state, address="x:1", host="here", pid=1, version="0", protocol_version=1,
        started_at_s=0, **fields,
    )  # fmt: skip


def sequence(name, completion_tokens, tail="attention-1", state="DECODING", prompt_tokens=10):
    ranges = [
        common_pb2.TokenRange(start=0, end=5, node="attention-9"),
        common_pb2.TokenRange(start=5, node=tail),
    ]
    return weight_pb2.SequenceInfo(
        sequence=name, state=state, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens,
        route=common_pb2.Route(ranges=ranges if tail else []),
    )  # fmt: skip


class World:
    def __init__(self, store, keys, office):
        self.store, self.keys = store, keys
        self.now_s = 1000.0
        self.used = 0
        self.silent = False
        self.sequences_now = []
        self.told = []
        self.scaler = Autoscaler(
            store, keys, office.fenced, self, self, Settings,
            tell=self.told.append, clock=lambda: self.now_s,
        )  # fmt: skip

    def of(self, role):
        if role is Role.WEIGHT:
            return [member(role, "weight-1")]
        ready = member(role, "attention-1", kv_capacity_tokens=1000, kv_used_tokens=900)
        return [ready, member(role, "attention-2", State.DRAINING, kv_capacity_tokens=9000)]

    async def stats(self, asked):
        assert asked.id == "attention-1", "a draining node is no budget"
        if self.silent:
            return None
        return attention_pb2.StatsReply(
            node=asked.id, capacity_tokens=1000, used_tokens=self.used, kv_bytes=8000
        )

    async def sequences(self, asked):
        return self.sequences_now

    async def want(self, count, autoscale=ON):
        await desired.set_desired(
            self.store, self.keys, count, actor=Actor.USER, current=None, now_s=self.now_s
        )
        await desired.set_autoscale(self.store, self.keys, autoscale, now_s=self.now_s)

    async def spec(self):
        return (await desired.read(self.store, self.keys))[0]


@pytest.fixture
async def world(store, keys):
    return World(store, keys, await Office.take(store, keys))


async def test_a_full_fleet_grows_and_says_why(world):
    await world.want(1)
    world.used, world.now_s = 900, 1100.0
    await world.scaler.step()
    spec = await world.spec()
    assert (spec.desired, spec.set_by, spec.updated_at_s) == (2, "autoscaler", 1100.0)
    assert spec.autoscale.active, "its own changes do not pause it"
    (told,) = world.told
    assert told.reason == "Autoscaled" and told.message.startswith("from 1 to 2: 90% of 1 nodes' budget")


async def test_nodes_it_lets_go_have_no_deadline_that_was_meant_for_others(world):
    await desired.set_desired(
        world.store, world.keys, 1, actor=Actor.USER, current=None, deadline_s=5, now_s=world.now_s
    )
    await desired.set_autoscale(world.store, world.keys, ON, now_s=world.now_s)
    world.used, world.now_s = 900, 1100.0
    await world.scaler.step()
    spec = await world.spec()
    assert (spec.desired, spec.scale_deadline) == (2, None)


async def test_it_does_nothing_unless_it_is_asked_to(world):
    await world.want(1, Autoscale())
    world.used, world.now_s = 900, 1100.0
    assert await world.scaler.step() is None
    assert (await world.spec()).desired == 1


async def test_a_count_set_by_hand_pauses_it_until_it_is_turned_on_again(world):
    await world.want(1)
    await desired.set_desired(world.store, world.keys, 1, actor=Actor.USER, current=None, now_s=world.now_s)
    spec = await world.spec()
    assert spec.autoscale.paused and not spec.autoscale.active, "also where the count stays as it is"
    world.used, world.now_s = 900, 1100.0
    assert await world.scaler.step() is None
    await desired.set_autoscale(world.store, world.keys, ON, now_s=world.now_s)
    world.now_s += 10
    await world.scaler.step()
    assert (await world.spec()).desired == 2


async def test_it_shrinks_one_by_one_after_the_cooldown(world):
    await world.want(3)
    counts = []
    for _ in range(16):
        world.now_s += 10
        await world.scaler.step()
        counts.append((await world.spec()).desired)
    assert counts == [3] * 6 + [2] * 6 + [1] * 4, "low since its first look, which was after 10 s"


async def test_growth_is_measured_from_the_tails(world):
    await world.want(1)
    world.used, world.now_s = 500, 1100.0
    world.sequences_now = [sequence("a", 0), sequence("b", 0)]
    assert (await world.scaler.step()).desired == 1
    world.now_s += 1
    # 40 tokens per second each: 80 a second, and a start takes 5 s.
    world.sequences_now = [sequence("a", 40), sequence("b", 40)]
    assert (await world.scaler.step()).desired == 2


async def test_what_a_silent_node_held_still_counts(world):
    await world.want(1)
    world.silent, world.now_s = True, 1100.0
    await world.scaler.step()
    assert (await world.spec()).desired == 2


async def test_a_hand_that_is_quicker_wins(world):
    await world.want(1)
    world.used, world.now_s = 900, 1100.0
    look = world.sequences

    async def meanwhile(asked):
        await desired.set_desired(world.store, world.keys, 3, actor=Actor.USER, current=None, now_s=0)
        return await look(asked)

    world.sequences = meanwhile
    await world.scaler.step()
    assert ((await world.spec()).desired, (await world.spec()).set_by) == (3, "user") and world.told == []


async def test_an_ex_leader_scales_nothing(world):
    await world.want(1)
    await Office.take(world.store, world.keys)
    world.used, world.now_s = 900, 1100.0
    with pytest.raises(Deposed):
        await world.scaler.step()
    assert (await world.spec()).desired == 1


def test_the_pace_is_the_mean_of_those_that_ran():
    pace = Pace()
    assert pace.step_s([sequence("a", 5), sequence("b", 5)], 100.0) == 0
    assert pace.step_s([sequence("a", 15), sequence("b", 35), sequence("new", 50)], 101.0) == 1 * 2 / 40
    assert pace.step_s([sequence("a", 15), sequence("b", 55)], 102.0) == 1 / 20, "one of them rests"
    assert pace.step_s([sequence("a", 15)], 103.0) == 0


def reads(node, sums):
    return attention_pb2.StatsReply(node=node, reads=attention_pb2.ReadSums(**msgspec.structs.asdict(sums)))


def test_how_a_node_reads_is_measured_between_looks_and_remembered_while_it_is_silent():
    readings, sums = Readings(), ReadSums()
    for size in range(100, 2000, 100):
        sums.add(size, 0.01 + size / 1000)
    (found,) = readings.look([reads("a", sums)]).values()
    assert (found.bandwidth_bytes_per_s, found.step_s) == (pytest.approx(1000), pytest.approx(1.0))
    assert readings.look([attention_pb2.StatsReply(node="a")])["a"] == found, "no answer"
    for _ in range(60):  # it gets twice as fast, and that is found out in time
        for size in range(100, 2000, 100):
            sums.add(size, 0.01 + size / 2000)
        found = readings.look([reads("a", sums)])["a"]
    assert found.bandwidth_bytes_per_s == pytest.approx(2000, rel=0.1)
    after = readings.look([reads("a", ReadSums(steps=1, bytes=5, seconds=1))])["a"]
    assert after.bandwidth_bytes_per_s == pytest.approx(found.bandwidth_bytes_per_s, rel=0.2), "a new engine"
    assert readings.look([]) == {} and readings.look([attention_pb2.StatsReply(node="a")]) == {}, "gone"


def test_steps_count_once_however_often_one_looks():
    readings, sums = Readings(), ReadSums()
    for size in range(100, 2000, 100):
        sums.add(size, 0.01 + size / 1000)
    for _ in range(100):
        readings.look([reads("a", sums)])
    for size in range(100, 2000, 100):
        sums.add(size, 0.01 + size / 2000)
    found = readings.look([reads("a", sums)])["a"]
    assert found.bandwidth_bytes_per_s == pytest.approx(2000, rel=0.05), "the older ones have faded"


def test_the_rest_of_a_step_is_what_the_slowest_reader_leaves():
    assert rest_s(0.05, [Reading(1e9, 0.01), Reading(1e9, 0.03)]) == pytest.approx(0.02)
    assert rest_s(0.05, []) == 0.05 and rest_s(0.0, [Reading(1e9, 0.01)]) == 0.0


def test_tails_are_counted_where_they_are_and_waiting_prompts_too():
    sequences = [sequence("a", 1), sequence("b", 1, "attention-2"), sequence("c", 0, None, "WAITING", 70)]
    stats = [attention_pb2.StatsReply(node="attention-1", capacity_tokens=10, used_tokens=3, kv_bytes=80)]
    (found,) = node_loads(stats, sequences)
    assert (found.open_tails, found.used_tokens, found.bytes_per_token) == (1, 3, 8.0)
    assert waiting_tokens(sequences) == 70


@pytest.mark.parametrize(
    "cluster, own, spec, expected",
    [
        ((1, 64), (1, 64), (0, 64), (1, 64)),
        ((2, 6), (1, 8), (0, 64), (2, 6)),
        ((1, 64), (3, 5), (4, 64), (4, 5)),
        ((5, 64), (1, 3), (0, 64), (3, 3)),
    ],
    ids=["none", "cluster's", "spec's", "nothing between them"],
)
def test_all_bounds_hold_at_once(cluster, own, spec, expected):
    found = bounded(
        Settings(min=cluster[0], max=cluster[1]),
        AttentionSpec(desired=4, min=spec[0], max=spec[1], autoscale=Autoscale(min=own[0], max=own[1])),
    )
    assert (found.min, found.max) == expected


def test_autoscale_bounds_that_cross_are_refused():
    with pytest.raises(ValueError, match="3 to 2"):
        Autoscale(min=3, max=2)
