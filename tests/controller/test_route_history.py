"""The checker of routes passes what can lawfully happen, and finds what it is for."""

import asyncio
import sys
import time
from pathlib import Path

import pytest
from flume_common.membership import Member, Role, State, register
from flume_common.route_store import RouteWriter, encode_route
from flume_common.routes import Route
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from recorder import recorded
from route_history import Ended, Gap, Seen, Written, violations

NODES = ("a1", "a2", "a3")
WEIGHTS = ("w1", "w2")
LEASE = {"w1": 11, "w2": 12}


def written(route, **changes):
    ranges = tuple((item.start, item.end, item.node) for item in route.ranges)
    fields = {"sequence": route.sequence, "owner": (route.weight_node, route.epoch), "ranges": ranges}
    return Written(**(fields | {"lease": LEASE[route.weight_node]} | changes))


class Life:
    """Weight nodes and routes that change as they may; `history` is what a recorder sees."""

    def __init__(self, data):
        self.data = data
        self.epochs = {}
        self.lost = set()
        self.revision = 0
        self.routes = {}
        self.history = []
        for node in WEIGHTS:
            self.register(node)

    def note(self, entry):
        self.revision += 1
        self.history.append((self.revision, entry))

    def pick(self, options):
        return self.data.draw(st.sampled_from(sorted(options)))

    def register(self, node):
        self.epochs[node] = self.revision + 1
        self.note(Seen(node, self.epochs[node], LEASE[node]))

    def write(self, route):
        self.routes[route.sequence] = route
        self.note(written(route))

    def begin(self):
        node = self.pick(WEIGHTS)
        sequence = self.pick({"s1", "s2"} - self.routes.keys() or {"s1"})
        if sequence not in self.routes:
            self.write(Route.start(sequence, node, self.epochs[node], self.pick(NODES)))

    def change(self):
        """A few changes of which only the last is written."""
        if not self.routes:
            return
        route = self.routes[self.pick(self.routes)]
        for _ in range(self.data.draw(st.integers(1, 3))):
            closed = route.ranges[:-1]
            if closed and self.data.draw(st.booleans()):
                item = self.pick_of(closed)
                start = self.data.draw(st.integers(item.start, item.end - 1))
                route = route.replace_holder(start, item.end, self.pick(NODES))
            else:
                length = route.tail.start + self.data.draw(st.integers(0, 9))
                route = route.move_tail(length, self.pick(NODES))
        self.write(route)

    def pick_of(self, items):
        return items[self.data.draw(st.integers(0, len(items) - 1))]

    def end(self):
        if self.routes:
            sequence = self.pick(self.routes)
            del self.routes[sequence]
            self.note(Ended(sequence))

    def give_way(self):
        """Preempted, and started again."""
        if self.routes:
            route = self.routes[self.pick(self.routes)]
            if self.data.draw(st.booleans()):
                self.note(Ended(route.sequence))
            self.write(Route.start(route.sequence, route.weight_node, route.epoch, self.pick(NODES)))

    def lose_lease(self):
        """Its routes go with it; it comes back, or another one takes over."""
        node = self.pick(WEIGHTS)
        mine = [route for route in self.routes.values() if route.weight_node == node]
        self.note(Seen(node, None))
        for route in mine:
            del self.routes[route.sequence]
            self.note(Ended(route.sequence))
        self.register(node)
        for route in mine:
            self.adopt(route, self.pick(WEIGHTS))

    def take_over(self):
        """While the other one is still registered; who had it before comes back under a new epoch."""
        if self.routes:
            route = self.routes[self.pick(self.routes)]
            (other,) = set(WEIGHTS) - {route.weight_node}
            self.adopt(route, other)

    def adopt(self, route, node):
        if (route.sequence, node, self.epochs[node]) in self.lost:
            return
        if node != route.weight_node:
            self.lost.add((route.sequence, route.weight_node, route.epoch))
        self.write(
            Route(route.sequence, node, self.epochs[node], route.ranges).move_tail(route.tail.start + 1, "a1")
        )


@given(st.data())
def test_what_can_lawfully_happen_is_left_alone(data):
    life = Life(data)
    steps = [life.begin, life.change, life.change, life.end, life.give_way, life.lose_lease, life.take_over]
    for index in data.draw(st.lists(st.integers(0, len(steps) - 1), max_size=25)):
        steps[index]()
    assert violations(life.history) == []


W1, W2 = Seen("w1", 1, 11), Seen("w2", 2, 12)
FIRST = Route.start("s", "w1", 1, "a1")
MOVED = FIRST.move_tail(10, "a2")
AGAIN = MOVED.move_tail(20, "a1")
OF_W2 = Route("s", "w2", 2, AGAIN.ranges)


def ranges(*items):
    return written(FIRST, ranges=items)


@pytest.mark.parametrize(
    "entries, complaint",
    [
        ([W1, ranges()], "no range"),
        ([W1, ranges((0, 9, "a"))], "exactly the last range is open"),
        ([W1, ranges((0, None, "a"), (9, None, "b"))], "exactly the last range is open"),
        ([W1, ranges((0, 9, "a"), (10, None, "b"))], "a range starts at 10, the one before ends at 9"),
        ([W1, ranges((0, 9, "a"), (8, None, "b"))], "a range starts at 8, the one before ends at 9"),
        ([W1, ranges((1, None, "a"))], "a range starts at 1, the one before ends at 0"),
        ([W1, ranges((0, 0, "a"), (0, None, "b"))], "an empty range at 0"),
        ([W1, written(AGAIN), written(MOVED)], "the edges at [20] are gone"),
        ([W1, written(AGAIN), ranges((0, 20, "a"), (20, None, "b"))], "the edges at [10] are gone"),
        ([written(FIRST)], "w1 writes under epoch 1 and is not registered"),
        ([W1, Seen("w1", None), written(FIRST)], "is not registered"),
        ([W1, Seen("w1", 7, 11), written(FIRST)], "w1 writes under epoch 1 and is registered under 7"),
        ([W1, written(FIRST, lease=0)], "bound to lease 0, the owner's is b"),
        (
            [Seen("w1", 7, 11), written(FIRST, owner=("w1", 7)), W1, written(FIRST)],
            "the epoch of w1 fell from 7 to 1",
        ),
        ([W1, W2, written(OF_W2), written(FIRST), written(OF_W2)], "w2 lost it to w1 and writes again"),
        ([W1, W2, written(FIRST), written(OF_W2), written(FIRST)], "w1 lost it to w2 and writes again"),
    ],
)
def test_what_is_not_lawful_is_named(entries, complaint):
    found = violations(list(enumerate(entries, 1)))
    assert any(complaint in wrong for wrong in found), found


def test_what_is_out_of_order_is_named():
    assert "recorded after 5" in violations([(5, W1), (3, written(FIRST))])[0]


def test_after_a_gap_only_what_stands_is_judged():
    history = list(enumerate([W1, written(AGAIN), Gap(), written(FIRST)], 1))
    assert violations(history) == []
    assert violations([*history, (9, ranges((0, 5, "a"), (6, None, "b")))])


@given(st.data())
def test_a_lawful_history_with_one_write_undone_is_not(data):
    """Whatever moved on since is noticed to have gone back."""
    life = Life(data)
    life.routes["s"] = FIRST
    life.epochs["w1"] = 1
    life.history, life.revision = [(1, W1), (2, W2), (3, written(FIRST))], 3
    for _ in range(data.draw(st.integers(1, 6))):
        life.change()
    entries = [entry for _, entry in life.history if isinstance(entry, Written)]
    edges = [{start for start, _, _ in entry.ranges} for entry in entries]
    assert violations(life.history) == []
    back = data.draw(st.integers(0, len(edges) - 1))
    goes_back = edges[back] < edges[-1] and len(edges[back]) > 1
    life.note(entries[back])
    assert bool(violations(life.history)) is goes_back


async def test_a_recorder_sees_what_is_there_before_it_and_all_that_follows(etcd_endpoint, store, keys):
    member = Member(
        id="w1", role=Role.WEIGHT, state=State.READY, address="x:1", host="here", pid=1, version="0",
        protocol_version=1, started_at_s=time.time(),
    )  # fmt: skip
    async with (
        register(store, keys, member) as registration,
        RouteWriter(store, keys, registration) as writer,
    ):
        writer.put(FIRST)
        await writer.settled()
        with recorded(etcd_endpoint, keys.cluster) as history:
            writer.put(MOVED)
            await writer.settled()
            assert await asyncio.to_thread(history.violations) == []
            assert history.revisions == 3 and history.gaps == []
            stranger = encode_route(Route("s", "w9", 1, MOVED.ranges))
            await store.put(keys.route("s"), stranger)
            await store.put(keys.route("t"), b'{"sequence": "t"}')
            unreadable, wrong, *_ = await asyncio.to_thread(history.violations)
            assert "missing required field" in unreadable and "w9 writes under epoch 1 and is not" in wrong
    assert (await store.range(keys.root)).items.keys() == {keys.route("s"), keys.route("t")}
