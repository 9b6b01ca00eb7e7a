"""Captured steps over real lanes to real attention nodes, which run in threads: over frames, and direct."""

import random
import sys
import threading
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from flume_attention.messages import Attach
from flume_attention.node import Node
from flume_common.direct_region import ANSWERED_AT, mark
from flume_common.lanes import Port, Side
from flume_common.wire import Header, Kind, LaneShape, sequence_key
from flume_kernels.gpu.watchdog import Watchdog
from flume_weight.batch import Batch
from flume_weight.cuda.buckets import Buckets, StepSize
from flume_weight.cuda.captured_steps import CapturedSteps
from flume_weight.cuda.device_weights import on_device
from flume_weight.cuda.direct_exchange import DirectExchange
from flume_weight.cuda.driver import StepDriver
from flume_weight.cuda.eager import DeviceRangeAttention, EagerForward
from flume_weight.cuda.errors import RouteTooWide
from flume_weight.cuda.forward import CapturedForward
from flume_weight.cuda.lane_exchange import LaneExchange
from flume_weight.cuda.microbatching import Microbatching
from flume_weight.errors import PeerLost, PeerSilent, StepRefused
from flume_weight.model import LocalAttention, Transformer
from flume_weight.peer import Peer
from flume_weight.range_attention import Exchange
from flume_weight.sampling import Sampler, SamplingParams, sample_rows
from region_session import RegionSession, flag, make_region
from step_fakes import random_weights, small_config, step_device

TIMEOUT_S = 20.0
CONFIG = small_config(num_layers=4, vocab_size=300)
LAYOUT = CONFIG.layout("float32", block_tokens=16)
SHAPE = LaneShape(
    LAYOUT, max_step_tokens=16, max_step_sequences=4, kv_frame_bytes=4 * LAYOUT.layer_token_bytes
)
SIZE = StepSize(4)
WAYS = pytest.mark.parametrize("way", ["frames", "direct"])
PARAMS = [
    SamplingParams(temperature=0.5, seed=4),
    SamplingParams(temperature=0.6, top_k=20, logprobs=3, seed=5),
    SamplingParams(temperature=0.9, frequency_penalty=0.5, seed=6),
]  # one for each prompt
PENALISED = 2
PROMPTS = [[5, 9, 2, 33], [7, 12], [1, 2, 3, 4, 5, 6, 7, 8]]


class AttentionThread:
    """One attention node with one lane, as its engine runs it, beside the test."""

    def __init__(self, name, lane_number, way):
        self.name = name
        self.mapped = make_region(LAYOUT, SIZE.rows, step_device()[2])
        self._look_s = 0.02 if way == "frames" else 0.001
        self.lane_number = lane_number
        self.silent = threading.Event()
        self._weight_address = None
        self._addressed, self._connected = threading.Event(), threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name)

    def attach(self, port):
        """The weight node's end."""
        self._thread.start()
        assert self._addressed.wait(TIMEOUT_S)
        lane = port.connect(
            self.name,
            self.address,
            SHAPE,
            Side.WEIGHT,
            send_lane=self.lane_number,
            receive_lane=100 + self.lane_number,
        )
        self._weight_address = port.address
        self._connected.set()
        peer = Peer(self.name, lane, self.node_blocks)
        peer.region = self.mapped
        return peer

    def stop(self):
        self._stop.set()
        self._connected.set()
        self._thread.join(TIMEOUT_S)

    @torch.inference_mode()
    def _run(self):
        node = Node(64 * LAYOUT.block_bytes)
        with Port(spin_s=0) as port:
            self.address, self.node_blocks = port.address, 64
            self._addressed.set()
            self._connected.wait(TIMEOUT_S)
            if self._weight_address is None:
                return
            self.session = session = self._session(node, port)
            while not self._stop.is_set():
                port.wait(lambda: not self.silent.is_set() and session.advance(), self._look_s)
                if node.grant():
                    session.credit_due = True

    def _session(self, node, port):
        request = Attach(
            request=1, weight_node="weight-1", epoch=1, layout=LAYOUT, worker_address=self._weight_address,
            lane=100 + self.lane_number, max_step_tokens=SHAPE.max_step_tokens,
            max_step_sequences=SHAPE.max_step_sequences, kv_frame_bytes=SHAPE.kv_frame_bytes,
        )  # fmt: skip
        holdings = node.add("weight-1", node.admit(request))
        lane = port.connect(
            "weight-1", self._weight_address, SHAPE, Side.ATTENTION,
            send_lane=100 + self.lane_number, receive_lane=self.lane_number,
        )  # fmt: skip
        return RegionSession(node, "weight-1", 1, lane, holdings, mapped=self.mapped)


def index(rows):
    """A slice where they are side by side, as `batch` makes it."""
    if rows == list(range(rows[0], rows[-1] + 1)) if rows else True:
        return slice(rows[0], rows[-1] + 1) if rows else slice(0, 0)
    return torch.tensor(rows, dtype=torch.int64)


def sampler(params):
    return Sampler(params, [], CONFIG.vocab_size, CONFIG.eos_token_ids)


class WeightNode:
    """Sequences whose tokens lie on attention nodes; decoded by captured steps over lanes."""

    def __init__(self, port, peers, watchdog, parts=2, way="frames", microbatches=1):
        weights = random_weights(CONFIG)
        self.model = Transformer(CONFIG, weights)
        self.port, self.peers = port, peers
        self.device, ops, where = step_device()
        self.steps = CapturedSteps(self.device, ops, CONFIG, on_device(weights, where), parts)
        self.eager = DeviceRangeAttention(port, LAYOUT, LAYOUT.head_dim**-0.5, TIMEOUT_S)
        self.eager.epoch = 1
        self.random = random.Random(3)
        self.exchange = self.moving(LaneExchange(port, LAYOUT))
        self.direct = self.moving(DirectExchange(port, LAYOUT, self.device)) if way == "direct" else None
        self.forward = CapturedForward(
            self.steps, Buckets((SIZE.rows,)), StepDriver(watchdog, TIMEOUT_S), self.eager, self.exchange,
            Microbatching(CONFIG.num_layers, str(microbatches)), self.direct,
        )  # fmt: skip
        self.prefill_forward = EagerForward(Transformer(CONFIG, on_device(weights, where)), self.eager)
        self.oracle = LocalAttention(CONFIG.num_layers)
        self.number = 0
        self.samplers = [sampler(params) for params in PARAMS]
        self.tokens = [list(prompt) for prompt in PROMPTS]
        self.held = {}  # (sequence, peer) -> tokens
        self.tails = {}  # sequence -> (peer, start of its open range)
        for peer in peers:
            peer.want_blocks = 32
            self.eager.send_plan(Exchange(peer))
            assert port.wait(lambda peer=peer: peer.hear() and peer.ledger.unused_blocks >= 32, TIMEOUT_S)

    def moving(self, exchange):
        """With the device moving on in every round of the driver's loop."""
        progress = exchange.progress

        def both():
            self.device.run_some(self.random.randint(0, 16))
            progress()

        exchange.progress = both
        return exchange

    def move_tail(self, sequence, peer):
        """From the next token on it grows on this node."""
        position = len(self.tokens[sequence]) - 1
        if sequence in self.tails:
            old, start = self.tails[sequence]
            old.close(sequence, start, position - start)
        peer.open(sequence, position if sequence in self.tails else 0, sequence_key(str(sequence)))
        self.tails[sequence] = peer, position if sequence in self.tails else 0
        self.held.setdefault((sequence, peer), 0)

    def exchanges(self, rows):
        """rows: (sequence, its tokens in this step, its first position), those of one tail side by side."""
        found = []
        for peer in self.peers:
            exchange = Exchange(peer)
            at, asked, appended = 0, [], []
            for sequence, tokens, position in rows:
                here = range(at, at + tokens)
                at += tokens
                held, grows = self.held.get((sequence, peer), 0), self.tails[sequence][0] is peer
                if held:
                    asked += here
                if grows:
                    appended += here
                if held or grows:
                    exchange.rows.append((sequence, tokens * bool(held), tokens * grows, held, position))
            exchange.queries, exchange.num_queries = index(asked), len(asked)
            if appended:
                exchange.append = slice(appended[0], appended[-1] + 1)
                exchange.layers_per_kv = SHAPE.layers_per_kv(len(appended))
            if exchange.rows:
                found.append(exchange)
        return found

    def prefill(self):
        """All but the newest token of each, in two chunks: the second asks about the first."""
        for sequence, tokens in enumerate(self.tokens):
            self.move_tail(sequence, self.peers[sequence % len(self.peers)])
            half = (len(tokens) - 1) // 2
            for start, end in (0, half), (half, len(tokens) - 1):
                if start < end:
                    self.prefill_chunk(sequence, start, end)

    def prefill_chunk(self, sequence, start, end):
        rows = [(sequence, end - start, start)]
        ids, positions = torch.tensor(self.tokens[sequence][start:end]), torch.arange(start, end)
        batch = Batch(
            rows, ids, positions, torch.arange(end - start), [slice(0, end - start)], self.exchanges(rows)
        )
        self.number += 1
        got = self.prefill_forward.forward(self.number, batch).logits
        assert self.prefill_forward.finish() == []
        self.commit(rows)
        self.oracle.next_pass([(sequence, end - start)])
        want = self.model.forward(ids, positions, self.oracle, batch.logit_rows)
        torch.testing.assert_close(got, want, atol=3e-5, rtol=3e-5)

    def commit(self, rows):
        for sequence, tokens, _ in rows:
            self.held[sequence, self.tails[sequence][0]] += tokens

    def rows(self):
        order = sorted(
            range(len(self.tokens)), key=lambda sequence: self.peers.index(self.tails[sequence][0])
        )
        return [(sequence, 1, len(self.tokens[sequence]) - 1) for sequence in order]

    def batch(self, rows):
        ids = torch.tensor([self.tokens[sequence][position] for sequence, _, position in rows])
        positions = torch.tensor([position for *_, position in rows])
        samplers = [self.samplers[sequence] for sequence, *_ in rows]
        return Batch(rows, ids, positions, torch.arange(len(rows)), [], self.exchanges(rows), samplers)

    def step(self, rows):
        """The logits; `scores` are what they came with."""
        batch = self.batch(rows)
        self.number += 1
        self.last_batch = batch
        self.scores = self.forward.forward(self.number, batch)
        assert self.forward.finish() == []
        self.commit(rows)
        return self.scores.logits.clone()

    def expect(self, rows):
        self.oracle.next_pass([(sequence, 1) for sequence, *_ in rows])
        ids = torch.tensor([self.tokens[sequence][position] for sequence, _, position in rows])
        positions = torch.tensor([position for *_, position in rows])
        return self.model.forward(ids, positions, self.oracle, torch.arange(len(rows)))


@contextmanager
def cluster(nodes, parts=2, way="frames", microbatches=1):
    torch.set_num_threads(1)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # the driver spins, and the nodes are threads of the same process here
    threads = [AttentionThread(f"attention-{number}", number, way) for number in range(1, nodes + 1)]
    try:
        with Port(spin_s=0) as port, Watchdog() as watchdog:
            peers = [thread.attach(port) for thread in threads]
            weight = WeightNode(port, peers, watchdog, parts, way, microbatches)
            weight.prefill()
            yield weight, threads
    finally:
        for thread in threads:
            thread.stop()
        sys.setswitchinterval(interval_s)


@pytest.mark.parametrize("way, microbatches", [("frames", 1), ("frames", 2), ("direct", 1)])
def test_tokens_over_lanes_are_the_models_own_while_tails_move_and_nothing_is_captured_again(
    way, microbatches
):
    with cluster(2, way=way, microbatches=microbatches) as (weight, threads):
        for turn in range(6):
            if turn in (1, 4):
                for sequence in range(len(PROMPTS)):
                    weight.move_tail(sequence, weight.peers[(sequence + turn) % 2])
            rows = weight.rows()
            want, got = weight.expect(rows), weight.step(rows)
            torch.testing.assert_close(got, want, atol=3e-5, rtol=3e-5)
            for (sequence, *_), token in zip(rows, got.argmax(-1).tolist(), strict=True):
                weight.tokens[sequence].append(token)
        assert weight.steps.captures == (1 if way == "frames" else 2)
        assert weight.steps.of(StepSize(SIZE.rows, microbatches), way == "direct").replays == 6
        assert all(bool(thread.session.answered_directly) == (way == "direct") for thread in threads)


def test_a_node_is_asked_in_the_microbatches_of_its_rows_and_in_no_other(monkeypatch):
    sent = []

    def send(exchange, peer, kind, frame, elements):
        if kind is Kind.QUERY:
            layer, microbatch = frame.header[Header.LAYER], frame.header[Header.MICROBATCH]
            sent.append((int(layer), int(microbatch), peer.node))
        really(exchange, peer, kind, frame, elements)

    really = LaneExchange._send
    monkeypatch.setattr(LaneExchange, "_send", send)
    with cluster(2, microbatches=2) as (weight, _):
        # Rows 0 and 1 lie on the first node, row 2 on the second: the second microbatch is all of that.
        rows = weight.rows()
        assert [weight.tails[sequence][0] for sequence, *_ in rows] == [
            *weight.peers[:1] * 2,
            weight.peers[1],
        ]
        weight.step(rows)
        turns = [(layer, number) for layer in range(CONFIG.num_layers) for number in (0, 1)]
        assert sent == [(layer, number, f"attention-{number + 1}") for layer, number in turns]
        assert [exchange.second_rows for exchange in weight.last_batch.exchanges] == [0, 1]


def test_a_batch_that_fills_one_microbatch_runs_as_one(monkeypatch):
    with cluster(1, microbatches=2) as (weight, _):
        rows = weight.rows()[:2]
        torch.testing.assert_close(weight.step(rows), weight.expect(rows), atol=3e-5, rtol=3e-5)
        assert weight.steps.of(SIZE).replays == 1


def test_tokens_are_chosen_from_what_the_step_found_out_and_only_penalised_ones_from_their_logits():
    with cluster(2) as (weight, _):
        theirs = [sampler(params) for params in PARAMS]
        for turn in range(4):
            rows = weight.rows()
            logits = weight.step(rows)
            weight.scores.buffer[: len(rows)][[sequence != PENALISED for sequence, *_ in rows]] = torch.nan
            found = weight.scores.choose([weight.samplers[sequence] for sequence, *_ in rows])
            want = sample_rows([theirs[sequence] for sequence, *_ in rows], logits)
            assert weight.scores.rows_read == 1
            assert [each.token_id for each in found] == [each.token_id for each in want]
            assert [each.logprob for each in found] == pytest.approx(
                [each.logprob for each in want], abs=1e-5
            )
            for (sequence, *_), sampled in zip(rows, found, strict=True):
                weight.tokens[sequence].append(sampled.token_id)
            if turn == 1:
                weight.move_tail(0, weight.peers[1])  # and the rows come in another order
        assert weight.steps.captures == 1


@pytest.mark.parametrize(
    "layer, microbatches", [(0, 1), (CONFIG.num_layers - 1, 1), (0, 2), (CONFIG.num_layers - 1, 2)]
)
def test_a_node_that_says_nothing_fails_the_step_by_name_and_the_step_can_be_repeated(
    layer, microbatches, monkeypatch
):
    with cluster(2, microbatches=microbatches) as (weight, threads):
        rows = weight.rows()
        want = weight.expect(rows)
        weight.eager.timeout_s = 0.8
        query = LaneExchange.query

        def silences(exchange, microbatch, asked):
            if (asked, microbatch) == (layer, microbatches - 1):
                threads[1].silent.set()
            query(exchange, microbatch, asked)

        monkeypatch.setattr(LaneExchange, "query", silences)
        with pytest.raises(PeerLost, match=r"attention-2.*no answer within 0\.8 s") as lost:
            weight.step(rows)
        # Its rows are those of the second microbatch; the first may be waiting for the next layer's turn.
        assert layer in lost.value.__cause__.layers and len(lost.value.__cause__.layers) <= microbatches
        monkeypatch.undo()
        threads[1].silent.clear()
        weight.eager.timeout_s = TIMEOUT_S
        torch.testing.assert_close(weight.step(rows), want, atol=3e-5, rtol=3e-5)


@WAYS
def test_a_node_whose_process_ends_during_a_step_is_looked_for_and_lost_by_name(way, monkeypatch):
    with cluster(2, way=way) as (weight, threads):
        threads[1].silent.set()
        look = weight.port.wait

        def finds_it_gone(ready, timeout_s, fds=()):
            if timeout_s == 0.0:
                weight.peers[1].lane.fail("its process ended")
            return look(ready, timeout_s, fds)

        monkeypatch.setattr(weight.port, "wait", finds_it_gone)
        with pytest.raises(PeerLost, match=r"attention-2.*its process ended"):
            weight.step(weight.rows())
        assert weight.steps.of(SIZE, way == "direct").graph.done()


def test_a_node_that_takes_no_queries_is_lost_by_name(monkeypatch):
    with cluster(2) as (weight, _):
        monkeypatch.setattr(weight.peers[1].lane.sender(Kind.QUERY), "frame", lambda: None)
        with pytest.raises(PeerLost, match=r"attention-2.*took none of the last queries"):
            weight.step(weight.rows())
        assert weight.steps.of(SIZE).graph.done()


@WAYS
def test_a_sequence_on_more_nodes_than_a_step_merges_is_refused_before_anything_is_sent(way):
    with cluster(2, parts=1, way=way) as (weight, _):
        weight.step(weight.rows())
        weight.tokens = [[*tokens, 1] for tokens in weight.tokens]
        weight.move_tail(0, weight.peers[1])
        assert weight.forward.takes(weight.batch(weight.rows()))
        weight.step(weight.rows())
        weight.tokens = [[*tokens, 1] for tokens in weight.tokens]
        assert not weight.forward.takes(weight.batch(weight.rows()))
        with pytest.raises(RouteTooWide, match="2 attention nodes, captured steps merge 1"):
            weight.step(weight.rows())


def test_chunks_and_batches_beyond_the_largest_bucket_are_left_to_the_model():
    with cluster(1) as (weight, _):
        batch = weight.batch(weight.rows())
        assert weight.forward.takes(batch)
        assert not weight.forward.takes(replace(batch, chunks=[slice(0, 2)]))
        assert not weight.forward.takes(replace(batch, token_ids=torch.zeros(SIZE.rows + 1)))


class TestDirect:
    """Where the nodes' devices are asked in their own memory, and something is not as it should be."""

    def test_a_step_that_asks_a_node_without_a_region_goes_over_frames_and_the_next_need_not(self):
        with cluster(2, way="direct") as (weight, _):
            regions = [peer.region for peer in weight.peers]
            for missing in (None, 0, None, 1):
                for number, peer in enumerate(weight.peers):
                    peer.region = None if number == missing else regions[number]
                before = weight.steps.of(SIZE, direct=True).replays
                rows = weight.rows()
                want, got = weight.expect(rows), weight.step(rows)
                torch.testing.assert_close(got, want, atol=3e-5, rtol=3e-5)
                assert weight.steps.of(SIZE, direct=True).replays - before == (missing is None)
                for (sequence, *_), token in zip(rows, got.argmax(-1).tolist(), strict=True):
                    weight.tokens[sequence].append(token)
            assert weight.steps.captures == 2

    def test_more_rows_than_a_region_has_go_over_frames(self):
        with cluster(1, way="direct") as (weight, threads):
            weight.peers[0].region = make_region(LAYOUT, len(PROMPTS) - 1, weight.device.name)
            rows = weight.rows()
            torch.testing.assert_close(weight.expect(rows), weight.step(rows), atol=3e-5, rtol=3e-5)
            assert not threads[0].session.answered_directly

    @pytest.mark.parametrize("layer", [0, CONFIG.num_layers - 1])
    def test_a_node_that_does_not_answer_fails_the_step_by_name_and_what_it_left_passes_for_nothing(
        self, layer
    ):
        with cluster(2, way="direct") as (weight, threads):
            rows = weight.rows()
            want = weight.expect(rows)
            weight.eager.timeout_s = 0.3
            threads[1].session.stops_at = layer
            with pytest.raises(PeerLost, match=r"attention-2.*no answer within 0\.3 s"):
                weight.step(rows)
            flags = weight.steps.of(SIZE, direct=True).buffers.flags
            assert weight.steps.of(SIZE, direct=True).graph.done() and not flags.status.any()
            # Its device comes to the end of the abandoned step after all.
            late = threads[1].mapped
            late.memory[late.region.o_at :] = 0xFF
            flag(late, ANSWERED_AT).fill_(mark(weight.number, CONFIG.num_layers - 1))
            threads[1].session.stops_at = None
            weight.eager.timeout_s = TIMEOUT_S
            torch.testing.assert_close(weight.step(rows), want, atol=3e-5, rtol=3e-5)
            assert weight.steps.captures == 2

    def test_a_node_that_others_need_not_wait_for_is_left_once_patience_is_over(self):
        with cluster(2, way="direct") as (weight, threads):
            rows = weight.rows()
            want = weight.expect(rows)
            for peer in weight.peers:
                peer.patience_s = 0.05
            weight.eager.may_leave = lambda node: True
            threads[1].session.stops_at = 1
            with pytest.raises(PeerSilent, match="attention-2"):
                weight.step(rows)
            threads[1].session.stops_at = None
            weight.eager.may_leave = lambda node: False
            torch.testing.assert_close(weight.step(rows), want, atol=3e-5, rtol=3e-5)

    def test_a_node_that_refuses_a_step_fails_it_without_waiting(self):
        with cluster(2, way="direct") as (weight, _):
            rows = weight.rows()
            weight.held[rows[-1][0], weight.peers[1]] += 1  # than it has
            with pytest.raises(StepRefused, match=r"attention-2.*LENGTH_MISMATCH"):
                weight.step(rows)

    def test_a_closed_lanes_region_is_let_go(self):
        with cluster(1, way="direct") as (weight, _):
            weight.step(weight.rows())
            peer = weight.peers[0]
            peer.region = make_region(LAYOUT, SIZE.rows, weight.device.name)
            mapping = weakref.ref(peer.region.memory)
            weight.forward.forget(peer)
            assert mapping() is None
