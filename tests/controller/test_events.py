"""Which happenings become one event, and events in etcd."""

import asyncio
import sys
from pathlib import Path

import pytest
from flume_controller import event_store
from flume_controller.event_writer import event_writer
from flume_controller.events import BURST, Correlator, EventType, Happening
from flume_controller.happenings import of_nodes, of_scale
from flume_controller.plan import Phase
from flume_controller.spec import Actor, AttentionSpec

sys.path.insert(0, str(Path(__file__).parent))
from office import Office


def happening(object="attention/attention-1", reason="NodeReady", message="is ready", type=EventType.NORMAL):
    return Happening(object, type, reason, message)


def test_alike_happenings_are_one_event_that_counts_and_keeps_the_last_message():
    correlator = Correlator("controller-1")
    first = correlator.take(happening(), 1000.0)
    again = correlator.take(happening(message="is ready again"), 1500.0)
    assert (first.count, first.first_s, first.last_s) == (1, 1000.0, 1000.0)
    assert (again.id, again.count, again.first_s, again.last_s) == (first.id, 2, 1000.0, 1500.0)
    assert again.message == "is ready again" and again.source == "controller-1"


@pytest.mark.parametrize(
    "other",
    [
        happening(object="attention/attention-2"),
        happening(reason="NodeLost"),
        happening(type=EventType.WARNING),
    ],
    ids=["object", "reason", "type"],
)
def test_what_differs_in_more_than_the_message_is_an_event_of_its_own(other):
    correlator = Correlator("controller-1")
    first, second = correlator.take(happening(), 1000.0), correlator.take(other, 1000.0)
    assert first.id != second.id and second.count == 1


def test_after_ten_quiet_minutes_a_new_event_begins():
    correlator = Correlator("controller-1")
    first = correlator.take(happening(), 1000.0)
    second = correlator.take(happening(), 1600.1)
    assert second.count == 1 and second.id > first.id, "ids sort by time"


def test_one_object_may_be_told_of_25_times_and_then_every_5_minutes():
    correlator = Correlator("controller-1")
    taken = [correlator.take(happening(), 1000.0) for _ in range(BURST + 10)]
    assert [event is not None for event in taken] == [True] * BURST + [False] * 10
    assert correlator.take(happening("attention/attention-2"), 1000.0) is not None, "others are not silenced"
    assert correlator.take(happening(), 1299.0) is None
    assert correlator.take(happening(), 1300.0).count == BURST + 1
    assert correlator.take(happening(), 1301.0) is None
    assert correlator.dropped == 12


def test_what_is_remembered_has_a_bound():
    correlator = Correlator("controller-1")
    for number in range(3000):
        correlator.take(happening(f"attention/attention-{number}"), 1000.0)
    assert len(correlator._events) == len(correlator._buckets) == 1024


def reasons(before, after):
    return [item.reason for item in of_nodes(before, after)]


@pytest.mark.parametrize(
    "before, after, expected",
    [
        (None, Phase.STARTING, []),
        (Phase.STARTING, Phase.READY, ["NodeReady"]),
        (Phase.READY, Phase.READY, []),
        (Phase.READY, Phase.DRAINING, ["NodeDraining"]),
        (Phase.DRAINING, Phase.READY, ["NodeReady"]),
        (Phase.DRAINING, Phase.STOPPING, []),
        (Phase.STOPPING, None, ["NodeStopped"]),
        (Phase.STOPPING, Phase.DEAD, ["NodeStopped"]),
        (Phase.DEAD, None, []),
        (Phase.READY, Phase.DEAD, ["NodeLost"]),
        (Phase.READY, None, ["NodeLost"]),
        (Phase.READY, Phase.LOST, ["NodeLost"]),
        (Phase.LOST, Phase.STUCK, []),
        (Phase.LOST, Phase.READY, ["NodeReady"]),
        (Phase.STARTING, Phase.STUCK, ["NodeLost"]),
    ],
)
def test_what_is_told_of_a_node(before, after, expected):
    def one(phase):
        return {} if phase is None else {"attention-1": phase}

    assert reasons(one(before), one(after)) == expected


def test_a_scale_says_who_set_it():
    (up,) = of_scale(1, AttentionSpec(desired=3, set_by=Actor.AUTOSCALER))
    assert up.message == "from 1 to 3 attention nodes, set by autoscaler" and up.reason == "ScalingUp"
    assert [item.reason for item in of_scale(4, AttentionSpec(desired=3))] == ["ScalingDown"]
    assert of_scale(3, AttentionSpec(desired=3)) == []


async def until(condition, timeout_s=5.0):
    async with asyncio.timeout(timeout_s):
        while not (found := await condition()):  # noqa: ASYNC110 - etcd and processes are what is waited for
            await asyncio.sleep(0.01)
        return found


async def test_events_are_written_read_watched_and_kept_for_an_hour(store, keys):
    office = await Office.take(store, keys)
    async with (
        event_store.watch(store, keys) as events,
        event_writer(store, office.fenced, keys, Correlator("controller-1")) as writer,
    ):
        writer.tell(happening(), happening(reason="NodeDraining"))
        writer.tell(happening(message="is ready again"))
        await events.wait_newer(events.version)

        async def all_there():
            found = await event_store.read(store, keys)
            return found if sum(event.count for event in found) == 3 else None

        found = await until(all_there)
        assert {(event.reason, event.count) for event in found} == {("NodeReady", 2), ("NodeDraining", 1)}
        assert [event.reason for event in found] == ["NodeDraining", "NodeReady"], "the last one last"
        await until(lambda: asyncio.sleep(0, events.listed() == found))
    kv = await store.get(keys.events + found[0].id)
    assert 3600 < await store.time_to_live(kv.lease) <= 3900


async def test_an_event_nobody_can_read_is_left_out(store, keys):
    await store.put(f"{keys.events}0001-broken", b"not json")
    assert await event_store.read(store, keys) == []


async def test_an_ex_leader_writes_no_events(store, keys):
    from flume_common.election import Deposed

    office = await Office.take(store, keys)
    await Office.take(store, keys)
    with pytest.raises(Deposed):
        async with event_writer(store, office.fenced, keys, Correlator("controller-1")) as writer:
            writer.tell(happening())
            await asyncio.sleep(5)
    assert await event_store.read(store, keys) == []
