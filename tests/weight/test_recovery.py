"""Recovery without tensors: a weight node's bookkeeping against the attention nodes' own."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from flume_attention.blocks import BlockPool
from flume_attention.holdings import Holdings
from flume_attention.ranges import Range
from flume_common.layout import KvLayout
from flume_common.routes import Route
from flume_common.wire import HEADER_WORDS, Credit, Header, Kind, LaneShape, Plan, sequence_key
from flume_weight.adoption import choose, lay_out
from flume_weight.batch import build, commit
from flume_weight.fleet import Fleet
from flume_weight.moves import ClosedRange
from flume_weight.peer import Peer
from flume_weight.placement import Balance
from flume_weight.scheduler import StepLimits, schedule
from flume_weight.sequence import Sequence
from flume_weight.storage import Hole, Part
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCK = 4
MAX_ANSWER_TOKENS = 20
LAYOUT = KvLayout(2, 4, 2, 8, "float32", BLOCK)
LIMITS = StepLimits(max_sequences=8, prefill_tokens=24, mixed_prefill_tokens=12)
SHAPE = LaneShape(LAYOUT, LIMITS.max_tokens, 8, 1 << 16)


class Node:
    """An attention node without memory: what it is told, it checks as a real one does."""

    shape = SHAPE

    def __init__(self, name: str, blocks: int) -> None:
        self.holdings = Holdings(BlockPool(blocks), SHAPE)
        self.draining = False
        self.peer = Peer(name, self, blocks)  # this object plays the lane, its senders and its receivers
        self._frame = SimpleNamespace(header=np.zeros(HEADER_WORDS, np.int64), words=np.zeros(5000, np.int64))

    def sender(self, kind: Kind) -> Node:
        return self

    def receiver(self, kind: Kind) -> Node:
        return self

    def frame(self) -> SimpleNamespace:
        return self._frame

    def send(self, frame: SimpleNamespace, size: int) -> None:
        plan = Plan.decode(frame.header, frame.words)
        self.holdings.abandon()
        self.holdings.set_credit(plan.want_blocks, plan.returned_blocks)
        for op in plan.ops.tolist():
            self.holdings.apply(*op)
        if len(plan.rows):
            self.holdings.begin(plan.step, plan.rows)

    def grant(self) -> None:
        held = self.holdings
        free = held.blocks.free + held.reserved_blocks - held.unused
        if not self.draining:
            held.granted += max(0, min(free, held.want - held.unused))
            free = held.blocks.free + held.reserved_blocks - held.unused
        credit = Credit(held.granted, held.blocks.num_blocks, free, self.draining, 0)
        self.peer.ledger.hear(credit)


class World:
    """A weight node's decisions between steps, as its engine makes them, and nodes that come and go."""

    def __init__(self, blocks: int, margin_tokens: int = 8) -> None:
        self.fleet = Fleet(LAYOUT, Balance(margin_tokens), "weight")
        self.nodes: dict[str, Node] = {}
        self.sequences: list[Sequence] = []
        self.blocks = blocks
        self.number = 0
        self.lost_tokens = 0
        self.recomputed_tokens = 0
        self.moving = None  # the batch that is being pulled, and its target
        self.moved_tokens = 0

    def add_node(self, name: str) -> None:
        self.nodes[name] = node = Node(name, self.blocks)
        self.fleet.peers[name] = node.peer
        node.grant()

    def add_sequence(self, tokens: int) -> None:
        sequence = Sequence(f"s{len(self.sequences)}", list(range(tokens)), tokens, 0, None, 0.0)  # type: ignore[arg-type]
        self.sequences.append(sequence)
        assert self.fleet.start(sequence, self.sequences[:-1])

    def kill(self, name: str) -> None:
        _, affected = self.fleet.drop(name, self.sequences)
        del self.nodes[name]
        self.lost_tokens += sum(affected.values())

    def start_pull(self) -> None:
        batch = self.fleet.next_moves(self.sequences) if self.moving is None else None
        if batch is not None:
            self.moving = batch, self.fleet.peers[batch.target]

    def end_pull(self) -> None:
        """The target reads what is still there and it has room for; then the routes are swapped."""
        if self.moving is None:
            return
        (batch, target), self.moving = self.moving, None
        if self.fleet.peers.get(batch.target) is not target:
            return
        by_name = {sequence.name: sequence for sequence in self.sequences}
        for item in batch.ranges:
            if self._read(item, self.nodes[batch.target].holdings) and self.fleet.swap(
                by_name[item.sequence], item, batch.target
            ):
                self.moved_tokens += item.tokens

    def _read(self, item: ClosedRange, reader: Holdings) -> bool:
        source = self.nodes.get(item.node)
        slots = source.holdings.slots.values() if source else ()
        key = sequence_key(item.sequence)
        there = next((slot.range_at(item.start) for slot in slots if slot.key == key), None)
        free = reader.blocks.free + reader.reserved_blocks - reader.unused
        if there is None or not there.closed or LAYOUT.blocks_of(item.tokens) > free:
            return False
        assert there.length == item.tokens
        copy = Range(reader.blocks, BLOCK, item.start)
        copy.reserve(item.tokens)
        copy.commit(item.tokens)
        copy.closed = True
        reader.arrivals.add("", key, copy, 0.0)
        return True

    def step(self, dying: str | None = None) -> None:
        """One turn of the engine. A node that dies in it takes the whole step with it."""
        self.fleet.house(self.sequences)
        self.fleet.move_tails(self.sequences)
        self.fleet.set_wants(self.sequences)
        shares = schedule(self.fleet.candidates(self.sequences), self.fleet.unused_blocks(), BLOCK, LIMITS)
        by_name = {sequence.name: sequence for sequence in self.sequences}
        batch = build([(by_name[share.sequence], share.tokens) for share in shares], self.fleet.peers)
        self.number += 1
        for exchange in batch.exchanges:
            exchange.peer.send_plan(exchange.peer.plan_frame(), self.number, 1, exchange.rows, 1)
        self.check(batch)
        if dying is not None:
            self.kill(dying)
        else:
            self.commit(batch)
        self.fleet.flush(lambda peer: peer.send_plan(peer.plan_frame(), self.number, 1, [], 0))
        for node in self.nodes.values():
            node.grant()

    def run_until(self, reached) -> None:
        for _ in range(100):
            if reached():
                return
            self.step()
        raise AssertionError("never reached")

    def check(self, batch) -> None:
        """Every row is answered for each token before it, once."""
        asking = [row for exchange in batch.exchanges for row in self.asking(exchange.peer.node)]
        assert all(row.past for row in asking), "nobody is asked in vain"
        for row in batch.rows:
            key = sequence_key(row.sequence.name)
            seen = sum(run.tokens for asked in asking if asked.slot.key == key for run in asked.past)
            assert seen == row.sequence.position

    def asking(self, name: str) -> list:
        """The rows with queries of this step on a node."""
        step = self.nodes[name].holdings.step
        assert step is not None and step.number == self.number
        return step.asking

    def commit(self, batch) -> None:
        for node in self.nodes.values():
            step = node.holdings.step
            if step is not None and step.number == self.number and step.append_tokens:
                node.holdings.commit()
        again = commit(batch, self.fleet.peers, BLOCK)
        self.recomputed_tokens += sum(again.values())
        for row in batch.rows:
            self.fleet.close_filled_hole(row.sequence)
            if row.sequence.samples and row.sequence.completion_tokens < MAX_ANSWER_TOKENS:
                row.sequence.tokens.append(0)

    def agree(self) -> None:
        """Both sides have the same picture, and every token is held once or known to be lost."""
        for name, node in self.nodes.items():
            node.peer.send_plan(node.peer.plan_frame(), self.number, 1, [], 0)
            held = {slot.key: slot for slot in node.holdings.slots.values()}
            for sequence in self.sequences:
                slot = sequence.slots.get(name)
                there = held.get(sequence_key(sequence.name))
                parts = (
                    sorted((part.start, part.tokens, not part.is_open) for part in slot.parts) if slot else []
                )
                assert parts == [(r.start, r.length, r.closed) for r in there.ranges] if there else not parts
            assert node.peer.ledger.taken_blocks == node.holdings.taken
            assert not node.holdings.arrivals
            held_blocks = sum(slot.num_blocks for slot in node.holdings.slots.values())
            assert node.holdings.held_blocks == held_blocks
            assert node.holdings.blocks.held == held_blocks + node.holdings.reserved_blocks
        for sequence in self.sequences:
            stored = sum(slot.held_tokens for slot in sequence.slots.values())
            missing = sum(hole.end - hole.at for hole in sequence.holes)
            assert stored + missing == sequence.committed_tokens
            assert [h.start for h in sequence.holes] == sorted({h.start for h in sequence.holes})


names = st.sampled_from(["a", "b", "c"])
actions = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("kill"), names),
        st.tuples(st.just("die in a step"), names),
        st.tuples(st.just("drain"), names),
        st.tuples(st.just("evacuate"), names),
        st.tuples(st.just("pull"), st.sampled_from(["start", "end"])),
        st.tuples(st.just("come"), names),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=150)
@given(actions, st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(100, 300))
def test_whoever_dies_and_when_every_query_meets_every_token_before_it_once(actions, lengths, blocks):
    world = World(blocks)
    for name in "abc":
        world.add_node(name)
    for tokens in lengths:
        world.add_sequence(tokens)
    for action, argument in actions:
        present = argument in world.nodes
        match action:
            case "step":
                for _ in range(argument):
                    world.step()
            case "kill" if present:
                world.kill(argument)
            case "die in a step" if present:
                world.step(dying=argument)
            case "drain" if present:
                node = world.nodes[argument]
                node.draining = node.peer.leaving = not node.draining
            case "evacuate" if present:
                peer = world.nodes[argument].peer
                world.nodes[argument].draining = peer.leaving = peer.evacuating = not peer.evacuating
            case "pull" if argument == "start":
                world.start_pull()
            case "pull":
                world.end_pull()
            case "come" if not present:
                world.add_node(argument)
        world.agree()
    for name in "abc":
        if name not in world.nodes:
            world.add_node(name)
        world.nodes[name].draining = world.nodes[name].peer.leaving = False
        world.nodes[name].grant()
    world.run_until(lambda: not any(sequence.recovering for sequence in world.sequences))
    world.agree()
    assert world.recomputed_tokens == world.lost_tokens


def test_a_node_that_must_be_empty_soon_becomes_so_without_a_token_computed_again():
    world = World(200, margin_tokens=10_000)
    world.add_node("a")
    for tokens in 20, 30, 41:
        world.add_sequence(tokens)
    world.run_until(lambda: all(sequence.completion_tokens > 3 for sequence in world.sequences))
    world.add_node("b")
    world.nodes["b"].grant()
    leaving = world.nodes["a"]
    leaving.draining = leaving.peer.leaving = leaving.peer.evacuating = True
    world.step()
    world.start_pull()
    world.step()
    world.end_pull()
    world.step()
    world.agree()
    assert not leaving.holdings.slots and world.moved_tokens > 91 and not world.recomputed_tokens
    assert all(sequence.route.nodes == {"b"} for sequence in world.sequences)


def test_ranges_that_nobody_needs_any_more_are_freed_where_they_arrived():
    world = World(200, margin_tokens=10_000)
    for name in "abc":
        world.add_node(name)
    world.add_sequence(20)
    (sequence,) = world.sequences
    world.run_until(lambda: sequence.committed_tokens == 20)
    source, tail = sequence.tail_node, {"a", "b", "c"} - {sequence.tail_node}
    world.fleet.move_tail(sequence, min(tail))
    world.step()
    world.nodes[source].peer.leaving = world.nodes[source].peer.evacuating = True
    world.start_pull()
    batch, _ = world.moving
    assert batch.target == min(tail)
    assert world._read(batch.ranges[0], world.nodes[batch.target].holdings)
    assert not world.fleet.swap(None, batch.ranges[0], batch.target)
    world.agree()


def test_only_what_a_dead_node_held_is_lost():
    world = World(200, margin_tokens=10_000)
    world.add_node("a")
    world.add_sequence(20)
    (sequence,) = world.sequences
    world.run_until(lambda: sequence.committed_tokens == 20)
    world.add_node("b")
    world.add_node("c")
    world.fleet.move_tail(sequence, "b")
    world.run_until(lambda: sequence.committed_tokens == 30)
    world.fleet.move_tail(sequence, "c")
    world.run_until(lambda: sequence.committed_tokens == 33)
    world.kill("a")
    assert (sequence.holes, world.lost_tokens) == ([Hole(0, 20, 0)], 20)
    assert sequence.state == "PAUSED"
    world.kill("c")
    assert (sequence.committed_tokens, world.lost_tokens) == (30, 23)
    world.run_until(lambda: not sequence.holes)
    assert sequence.committed_tokens == 30 and sequence.state == "PAUSED"
    world.run_until(lambda: not sequence.recovering)
    assert world.recomputed_tokens == 23
    world.agree()
    assert sequence.route.nodes == {"b"}


def test_a_hole_is_filled_from_its_start_again_when_the_node_that_fills_it_dies():
    world = World(200, margin_tokens=10_000)
    world.add_node("a")
    world.add_sequence(70)
    (sequence,) = world.sequences
    world.run_until(lambda: sequence.committed_tokens == 70)
    world.add_node("b")
    world.fleet.move_tail(sequence, "b")
    world.run_until(lambda: sequence.committed_tokens == 75)
    world.add_node("c")
    world.nodes["c"].grant()
    world.kill("a")
    world.run_until(lambda: sequence.holes[0].at > 0)
    (hole,) = sequence.holes
    assert (hole.node, hole.at) == ("c", 24)
    world.add_node("a")  # back, with nothing, under the name that the route still has
    world.kill("c")
    assert (sequence.holes, world.lost_tokens) == ([Hole(0, 70, 0)], 94)
    world.run_until(lambda: sequence.holes[0].at > 0)
    assert sequence.holes == [Hole(0, 70, 24, "a")]
    world.kill("a")
    assert (sequence.holes, world.lost_tokens) == ([Hole(0, 70, 0)], 118)
    world.run_until(lambda: not sequence.recovering)
    world.agree()
    assert world.recomputed_tokens == 118 and sequence.route.nodes == {"b"}


def test_credit_of_an_older_epoch_of_a_node_is_ignored_and_counted():
    node = Node("a", 8)
    inbox = []
    node.poll = lambda: inbox.pop(0) if inbox else None
    node.give_back = lambda frame: None
    peer = Peer("a", node, 8, epoch=7)
    for epoch, granted in ((6, 5), (7, 2)):
        frame = SimpleNamespace(header=np.zeros(HEADER_WORDS, np.int64), words=np.zeros(8, np.int64))
        frame.header[Header.EPOCH] = epoch
        Credit(granted, 8, 0, False, 0).encode(frame.words)
        inbox.append(frame)
    assert peer.hear()
    assert (peer.ledger.granted_blocks, peer.epoch_rejected) == (2, 1)


def test_a_sequence_is_taken_over_from_nodes_that_together_hold_each_token_once():
    kept = {
        "a": [Part(0, 10), Part(20, 5)],
        "b": [Part(10, 10)],
        "again": [Part(5, 3)],  # lost from sight once, and computed again
        "late": [Part(25, 3)],
    }
    chosen = choose(kept, position=22)
    assert chosen == {
        "a": [Part(0, 10, False), Part(20, 2, False)],
        "b": [Part(10, 10, False)],
    }
    ranges, holes = lay_out(chosen, "t")
    assert Route("s", "w", 1, ranges).nodes == {"a", "b", "t"}
    assert [(r.start, r.end) for r in ranges] == [(0, 10), (10, 20), (20, 22), (22, None)] and not holes


def test_what_nobody_keeps_becomes_holes():
    ranges, holes = lay_out({"b": [Part(10, 10, False)], "c": [Part(30, 5, False)]}, "c")
    assert holes == [Hole(0, 10, 0), Hole(20, 30, 20)]
    assert [(r.start, r.end) for r in ranges] == [(0, 10), (10, 20), (20, 30), (30, 35), (35, None)]
    assert choose({"a": [Part(7, 5)]}, position=7) == {}
