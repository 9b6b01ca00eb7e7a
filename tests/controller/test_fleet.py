"""One pass at a time over real etcd, with a fake provider, fake node calls and a clock of the test's."""

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from flume_common.election import Deposed
from flume_common.membership import Member, Role, State
from flume_controller.fleet import ActionsFailed, AttentionFleet, SpecMoved
from flume_controller.observe import Held, Patience
from flume_controller.providers.base import Instance
from flume_controller.spec import Actor, AttentionSpec, Deadline, decode_spec, decode_status, encode

sys.path.insert(0, str(Path(__file__).parent))
from fleet_fakes import FakeNodes, FakeProvider
from office import Office


class World:
    """A fleet and everything around it."""

    def __init__(self, store, keys, office):
        self.store, self.keys = store, keys
        self.now_s = 1000.0
        self.provider = FakeProvider(self.clock)
        self.nodes = FakeNodes()
        self.office = office
        self.told = []
        self.last_known = None
        self.restart()

    def clock(self):
        return self.now_s

    def restart(self):
        """A new controller over the same world."""
        self.fleet = AttentionFleet(
            self.store, self.keys, self.office.fenced, self.provider, self.nodes, AttentionSpec(desired=1),
            leader="controller-1", tell=self.tell, patience=Patience(start_s=100, lost_s=30),
            progress_deadline_s=60, clock=self.clock, last_known=self.last_known,
        )  # fmt: skip

    def tell(self, *happenings):
        self.told += happenings

    def news(self):
        """What was told since the last time, `object reason`."""
        told, self.told = self.told, []
        return [f"{item.object} {item.reason}" for item in told]

    async def want(self, desired, generation=2, **fields):
        await self.store.put(
            self.keys.spec_attention, encode(AttentionSpec(desired=desired, generation=generation, **fields))
        )

    async def spec(self):
        return decode_spec((await self.store.get(self.keys.spec_attention)).value)

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

    async def condition(self, kind):
        return next(item for item in (await self.status()).conditions if item.type == kind)

    async def degraded(self):
        return await self.condition("Degraded")


@pytest.fixture
async def world(store, keys):
    return World(store, keys, await Office.take(store, keys))


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


async def test_the_status_names_its_writer_and_the_epoch(world):
    await world.turn()
    status = await world.status()
    assert (status.leader, status.epoch) == ("controller-1", world.office.fenced.term.epoch)


async def test_the_writes_of_an_ex_leader_are_refused_and_counted(world):
    await world.ready(1)
    before = await world.store.get(world.keys.status_attention)
    await Office.take(world.store, world.keys)
    await world.want(2, generation=3)
    with pytest.raises(Deposed):
        await world.turn()
    after = await world.store.get(world.keys.status_attention)
    assert after == before and world.office.candidate.epoch_rejected == 1


async def test_a_leader_that_could_not_renew_starts_and_stops_nothing(world):
    await world.ready(1)
    world.office.renewal.left_s = -0.1
    await world.want(2, generation=3)
    with pytest.raises(Deposed):
        await world.turn()
    assert list(world.provider.known) == ["attention-1"]


async def test_a_start_that_was_begun_is_recorded_though_the_pass_is_cancelled(world):
    begun, go_on = asyncio.Event(), asyncio.Event()
    start = world.provider.start

    async def slow_start(node):
        begun.set()
        await go_on.wait()
        await start(node)

    world.provider.start = slow_start
    turn = asyncio.create_task(world.turn())
    await begun.wait()
    turn.cancel()
    await asyncio.sleep(0.01)
    assert not turn.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await turn
    assert list(world.provider.known) == ["attention-1"]


async def test_a_scale_up_that_cannot_complete_returns_to_the_last_good_count(world):
    await world.ready(2)
    world.news()
    await world.want(5, generation=3, set_by=Actor.USER)
    await world.turn()
    await world.turn(after_s=59)
    assert (await world.spec()).desired == 5 and (await world.condition("Progressing")).status == "True"
    await world.turn(after_s=1)
    spec, status = await world.spec(), await world.status()
    assert (spec.desired, spec.set_by, spec.generation) == (2, "controller", 4)
    assert (status.observed_generation, status.last_good) == (4, 2)
    assert (status.gave_up.generation, status.gave_up.wanted, status.gave_up.returned_to) == (3, 5, 2)
    assert (await world.condition("Progressing")).reason == "ProgressDeadlineExceeded"
    assert [item for item in world.news() if item.startswith("fleet")] == [
        *("fleet/attention ScalingUp", "fleet/attention ScaleTimedOut", "fleet/attention ScalingDown"),
    ]
    await world.want(3, generation=5, set_by=Actor.USER)
    await world.turn()
    assert (await world.condition("Progressing")).status == "True", "a new wish is a new try"


async def test_each_node_that_becomes_ready_gives_a_scale_more_time(world):
    await world.ready(1)
    await world.want(3, generation=3)
    await world.turn()
    await world.turn(after_s=50)
    await world.register("attention-2")
    await world.turn(after_s=9)
    await world.turn(after_s=50)
    assert (await world.spec()).desired == 3
    await world.turn(after_s=10)
    assert (await world.spec()).desired == 1


async def test_a_lost_node_that_cannot_be_replaced_is_no_reason_to_want_fewer(world):
    await world.ready(2)
    world.provider.crash("attention-2")
    world.provider.error = OSError("no room")
    for _ in range(3):
        with pytest.raises(ActionsFailed):
            await world.turn(after_s=40)
    assert (await world.spec()).desired == 2
    assert (await world.condition("Progressing")).reason == "ProgressDeadlineExceeded"


async def test_a_spec_that_changes_while_a_pass_gives_up_is_left_alone(world):
    await world.ready(1)
    await world.want(4, generation=3)
    await world.turn()

    async def edit():
        await world.want(6, generation=4)

    world.provider.before_listing = edit
    with pytest.raises(SpecMoved):
        await world.turn(after_s=60)
    assert (await world.spec()).desired == 6


async def test_a_drained_node_is_replaced_and_its_id_not_given_again(world):
    await world.ready(2)
    await world.want(2, generation=3, drained=("attention-1",))
    await world.turn()
    assert world.nodes.calls == [("drain", "attention-1")]
    assert set(world.provider.known) == {"attention-1", "attention-2", "attention-3"}
    await world.register("attention-1", State.DRAINING)
    world.nodes.holds = {"attention-1": Held(0, 0, safe_to_delete=True)}
    await world.turn()
    assert world.provider.stopped == ["attention-1"]
    world.provider.known["attention-1"] = replace(world.provider.known["attention-1"], running=False)
    await world.lapse("attention-1")
    await world.register("attention-3")
    await world.want(3, generation=4, drained=("attention-1",))
    await world.turn()
    assert set(world.provider.known) == {"attention-2", "attention-3", "attention-4"}


async def leaving(world, deadline, held_tokens=9):
    """attention-2 was told to leave and holds something."""
    await world.ready(2)
    await world.want(1, generation=3, scale_deadline=deadline)
    await world.turn()
    assert world.nodes.calls == [("drain", "attention-2", round(deadline.by_s - world.now_s))]
    await world.register("attention-2", State.DRAINING, leave_by_s=deadline.by_s)
    world.nodes.holds = {"attention-2": Held(held_tokens, 1)}
    world.news()


async def test_a_node_that_still_holds_something_when_its_deadline_is_over_goes_and_people_are_told(world):
    await leaving(world, Deadline(within_s=30, by_s=1030))
    while world.now_s < 1029:
        assert await world.turn() < 1
    assert world.provider.stopped == []
    await world.turn()
    assert world.provider.stopped == ["attention-2"]
    told = [item for item in world.told if item.reason == "DrainDeadlineExceeded"]
    assert [(item.object, item.type) for item in told] == [("attention/attention-2", "Warning")]
    assert "9 tokens" in told[0].message
    await world.turn()
    assert world.provider.stopped == ["attention-2"] and world.nodes.calls[1:] == []


async def test_another_controller_carries_on_with_the_deadline(world):
    await leaving(world, Deadline(within_s=30, by_s=1030))
    world.restart()
    await world.turn(after_s=10)
    assert world.nodes.calls[1:] == [], "the node knows already"
    await world.register("attention-2", State.DRAINING)
    await world.turn()
    assert world.nodes.calls[1:] == [("drain", "attention-2", round(1030 - world.now_s))]


async def test_a_node_that_was_emptied_in_time_goes_without_a_warning(world):
    await leaving(world, Deadline(within_s=30, by_s=1030))
    world.nodes.holds = {"attention-2": Held(0, 0, safe_to_delete=True)}
    await world.turn()
    assert world.provider.stopped == ["attention-2"]
    assert "DrainDeadlineExceeded" not in [item.reason for item in world.told]


async def test_the_last_node_that_could_go_on_is_not_stopped_at_its_deadline(world):
    await leaving(world, Deadline(within_s=30, by_s=1030))
    await world.lapse("attention-1")
    await world.turn(after_s=40)
    assert world.provider.stopped == []
    await world.register("attention-1")
    await world.turn()
    assert world.provider.stopped == ["attention-2"]


async def test_what_becomes_of_nodes_is_told_once(world):
    await world.turn()
    assert world.news() == ["fleet/attention ScalingUp"]
    await world.register("attention-1")
    await world.turn()
    await world.turn()
    assert world.news() == ["attention/attention-1 NodeReady"]
    await world.want(0, generation=2)
    await world.register("attention-1", State.DRAINING)
    await world.turn()
    assert world.news() == ["fleet/attention ScalingDown", "attention/attention-1 NodeDraining"]


async def test_a_new_leader_tells_nothing_of_what_it_finds(world):
    await world.ready(2)
    world.news()
    world.restart()
    await world.turn()
    assert world.news() == []


async def test_how_long_nodes_took_to_become_ready_is_measured(world):
    await world.turn()
    assert world.fleet.prepare_s is None
    await world.register("attention-1")
    await world.turn(after_s=7)
    await world.turn(after_s=100)
    assert world.fleet.prepare_s == 7


class YoungIncarnation:
    """What etcd came back as, so many seconds ago."""

    has_news = False
    spec = None
    incarnation_age_s = 3.0


async def test_nobody_is_let_go_while_a_new_incarnation_is_young(world):
    await world.ready(3)
    world.last_known = YoungIncarnation()
    world.restart()
    await world.lapse("attention-2")  # it has not registered there yet
    await world.want(1, generation=3)
    wish_s = await world.turn(after_s=500)
    assert (world.nodes.calls, world.provider.stopped) == ([], [])
    assert 0 < wish_s <= 12, "it looks again as soon as it may act"
    world.last_known.incarnation_age_s = 60.0
    await world.turn()
    assert world.nodes.calls, "then it does"
