"""Captured decode steps on a simulated device, held against the model's own forward pass."""

from contextlib import contextmanager

import pytest
import torch
from flume_kernels.gpu.watchdog import Watchdog
from flume_weight.cuda.buckets import StepSize
from flume_weight.cuda.captured_steps import CapturedSteps
from flume_weight.cuda.device_weights import on_device
from flume_weight.cuda.driver import StepDriver
from flume_weight.cuda.errors import DeviceStuck, StepTimedOut
from flume_weight.errors import PeerLost
from flume_weight.model import LocalAttention, Transformer
from flume_weight.model.config import YarnScaling
from step_fakes import ON_GPU, HeldPast, random_weights, small_config, step_device

TIMEOUT_S = 20.0
NODES = 3
in_lockstep = pytest.mark.skipif(ON_GPU, reason="moves the device on by hand")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def watchdog():
    with Watchdog() as watchdog:
        yield watchdog


class Decoding:
    """Some sequences, decoded step by step by captured steps and by the oracle."""

    def __init__(self, watchdog, prompts, config=None, dtype=torch.float32, timeout_s=TIMEOUT_S, seed=0):
        self.config = config or small_config()
        weights = random_weights(self.config, dtype)
        self.model = Transformer(self.config, weights)
        self.device, ops, where = step_device()
        self.steps = CapturedSteps(self.device, ops, self.config, on_device(weights, where), parts=NODES)
        self.driver = StepDriver(watchdog, timeout_s, drain_timeout_s=1.0)
        self.exchange = HeldPast(self.device, self.config, NODES, seed)
        self.oracle = LocalAttention(self.config.num_layers)
        self.tokens = [list(prompt) for prompt in prompts]
        self._prefill()

    def _prefill(self):
        """All but the newest token of each sequence, once; both sides hold the same K and V."""
        nothing = torch.zeros(0, self.config.num_kv_heads, self.config.head_dim, dtype=self.model.dtype)
        for number, tokens in enumerate(self.tokens):
            past = [(nothing, nothing)] * self.config.num_layers
            if len(tokens) > 1:
                self.oracle.next_pass([(number, len(tokens) - 1)])
                self._forward(tokens[:-1], range(len(tokens) - 1))
                past = self.oracle._past[number]
            self.exchange.hold(number, past)

    def _forward(self, ids, positions):
        rows = torch.arange(len(ids))
        return self.model.forward(torch.tensor(ids), torch.tensor(list(positions)), self.oracle, rows)

    def expect(self, rows):
        """The oracle's logits of the next step."""
        self.oracle.next_pass([(number, 1) for number in rows])
        return self._forward(*self._inputs(rows))

    def _inputs(self, rows):
        return [self.tokens[row][-1] for row in rows], [len(self.tokens[row]) - 1 for row in rows]

    def run(self, size, rows):
        """Logits of one captured step."""
        step = self.steps.of(size)
        ids, positions = self._inputs(rows)
        step.buffers.fill(torch.tensor(ids), torch.tensor(positions))
        self.exchange.begin(rows, step.buffers)
        self.times = self.driver.run(step, self.exchange)
        self.exchange.finish()
        return step.buffers.logits[: len(rows)].cpu().clone()

    def append(self, rows, logits):
        for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
            self.tokens[row].append(token)


PROMPTS = [[5, 9, 2, 33], [7], [1, 2, 3, 4, 5, 6, 7, 8], [60, 11], [3, 3, 3]]
SIZES = [StepSize(8, 1), StepSize(8, 2), StepSize(6, 3)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logits_are_the_models_own_whatever_the_microbatches(watchdog, size):
    decoding = Decoding(watchdog, PROMPTS)
    rows = list(range(len(PROMPTS)))
    for _ in range(3):
        want = decoding.expect(rows)
        got = decoding.run(size, rows)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
        decoding.append(rows, got)


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True},
        {"qkv_bias": True, "tie_word_embeddings": True},
        {"output_bias": True, "mlp_bias": True},
        {"rope_scaling": YarnScaling(4.0, 24), "rope_attention_factor": 1.14},
    ],
    ids=str,
)
def test_every_family_of_models_agrees_with_its_forward_pass(watchdog, changes):
    decoding = Decoding(watchdog, PROMPTS[:2], small_config(**changes))
    want = decoding.expect([0, 1])
    torch.testing.assert_close(decoding.run(StepSize(2), [0, 1]), want, atol=2e-5, rtol=2e-5)


def test_bfloat16_stays_close_to_the_forward_pass(watchdog):
    decoding = Decoding(watchdog, PROMPTS, dtype=torch.bfloat16)
    rows = list(range(len(PROMPTS)))
    want = decoding.expect(rows)
    got = decoding.run(StepSize(8), rows)
    assert (got - want).abs().max() < 0.03 * want.abs().max()


def test_tokens_stay_the_same_through_route_changes_batch_changes_and_buckets_without_a_capture(watchdog):
    decoding = Decoding(watchdog, PROMPTS, small_config(num_layers=2), seed=7)
    random = decoding.exchange.random
    sizes = [StepSize(2), StepSize(6, 2), StepSize(8)]
    decoding.steps.prepare(sizes)
    for _ in range(25):
        rows = sorted(random.sample(range(len(PROMPTS)), random.randint(1, len(PROMPTS))))
        size = random.choice([size for size in sizes if size.rows >= len(rows)])
        if random.random() < 0.5:
            decoding.exchange.recut()
        want = decoding.expect(rows)
        got = decoding.run(size, rows)
        assert got.argmax(-1).tolist() == want.argmax(-1).tolist()
        decoding.append(rows, got)
    assert decoding.steps.captures == decoding.device.captures == len(sizes)
    assert decoding.steps.replays == 25


@in_lockstep
def test_queries_leave_before_their_keys_are_computed(watchdog):
    decoding = Decoding(watchdog, PROMPTS[:1])
    step = decoding.steps.of(StepSize(1))
    step.buffers.fill(torch.tensor([5]), torch.tensor([3]))
    buffers, signals = step.buffers.microbatches[0], step.buffers.flags.host.signals[0]
    buffers.queries.fill_(torch.nan)
    buffers.keys.fill_(torch.nan)
    step.launch()
    while not signals.take():
        decoding.device.run_some(1)
    assert not buffers.queries.isnan().any()
    assert buffers.keys.isnan().all()
    decoding.device.run_some(1000)
    assert not buffers.keys[0].isnan().any(), "keys of a layer are there while its partials are awaited"
    assert buffers.keys[1:].isnan().all()


def test_keys_of_a_layer_travel_with_the_next_layers_queries(watchdog):
    decoding = Decoding(watchdog, PROMPTS[:1])
    said = []
    exchange = decoding.exchange
    query, keys = exchange.query, exchange.keys
    exchange.query = lambda microbatch, layer: (said.append(("Q", layer)), query(microbatch, layer))
    exchange.keys = lambda microbatch, layer: (said.append(("KV", layer)), keys(microbatch, layer))
    decoding.run(StepSize(1), [0])
    assert said == [("Q", 0), ("Q", 1), ("KV", 0), ("Q", 2), ("KV", 1), ("KV", 2)]


class TestFailures:
    def test_a_step_whose_partials_never_come_fails_and_the_next_one_is_right(self, watchdog):
        decoding = Decoding(watchdog, PROMPTS, timeout_s=0.2)
        rows = [0, 1, 2]
        want = decoding.expect(rows)
        for stalled_layer in range(decoding.config.num_layers):
            self.stall(decoding, StepSize(4, 2), rows, stalled_layer)
        decoding.driver.timeout_s = TIMEOUT_S
        got = decoding.run(StepSize(4, 2), rows)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
        assert decoding.steps.captures == 1

    def stall(self, decoding, size, rows, layer):
        exchange = decoding.exchange
        queries, answer = exchange.queries, exchange.arrived
        exchange.arrived = lambda microbatch, asked: asked < layer and answer(microbatch, asked)
        try:
            with pytest.raises(StepTimedOut) as failed:
                decoding.run(size, rows)
        finally:
            exchange.arrived = answer
        assert failed.value.layers and set(failed.value.layers) <= {layer}
        assert exchange.queries > queries

    def test_a_lost_node_fails_the_step_at_once_and_leaves_the_device_idle(self, watchdog):
        decoding = Decoding(watchdog, PROMPTS)

        def lost():
            raise PeerLost("attention-2", "its process ended")

        decoding.exchange.stall = lost
        want = decoding.expect([0, 1])
        with pytest.raises(PeerLost):
            decoding.run(StepSize(2), [0, 1])
        assert decoding.steps.of(StepSize(2)).graph.done()
        decoding.exchange.stall = None
        torch.testing.assert_close(decoding.run(StepSize(2), [0, 1]), want, atol=2e-5, rtol=2e-5)

    @in_lockstep
    def test_a_device_that_does_not_end_a_released_step_is_said_to_be_stuck(self, watchdog):
        decoding = Decoding(watchdog, PROMPTS, timeout_s=0.05)
        decoding.driver._drain_timeout_s = 0.1
        decoding.exchange.stall = lambda: False

        def dies(self=decoding.device):
            self.run_some = lambda count: 0

        decoding.steps.of(StepSize(1))
        query = decoding.exchange.query
        decoding.exchange.query = lambda *args: (query(*args), dies())
        decoding.exchange.stall = lambda: (_ for _ in ()).throw(PeerLost("attention-1", "gone"))
        with pytest.raises(DeviceStuck):
            decoding.run(StepSize(1), [0])


def test_a_watchdog_that_fires_as_a_step_ends_well_does_not_spoil_the_next(watchdog, monkeypatch):
    decoding = Decoding(watchdog, PROMPTS[:1])

    @contextmanager
    def fires_at_the_end(timeout_s, release):
        yield
        release()

    with monkeypatch.context() as patched:
        patched.setattr(watchdog, "guard", fires_at_the_end)
        decoding.run(StepSize(1), [0])
    decoding.tokens[0].append(4)
    decoding.oracle.next_pass([(0, 1)])
    decoding._forward([decoding.tokens[0][-2]], [len(decoding.tokens[0]) - 2])
    want = decoding.expect([0])
    torch.testing.assert_close(decoding.run(StepSize(1), [0]), want, atol=2e-5, rtol=2e-5)


def test_poison_while_the_last_layer_is_awaited_ends_the_step(watchdog):
    """After the last query no signal of the microbatch is left that poison could come back by."""
    decoding = Decoding(watchdog, PROMPTS[:1], timeout_s=0.1)
    answer = decoding.exchange.arrived
    last = decoding.config.num_layers - 1
    decoding.exchange.arrived = lambda microbatch, layer: layer < last and answer(microbatch, layer)
    with pytest.raises(StepTimedOut) as failed:
        decoding.run(StepSize(1), [0])
    assert failed.value.layers == [last]


def test_times_of_a_step_tell_attention_from_the_whole(watchdog):
    decoding = Decoding(watchdog, PROMPTS)
    decoding.run(StepSize(8), [0, 1])
    assert 0 < decoding.times.attention_s < decoding.times.total_s


@in_lockstep
def test_waits_for_captured_numbers_would_be_noticed_here(watchdog):
    """A check of these tests: waits that ask for the same numbers in every replay let it run ahead."""
    decoding = Decoding(watchdog, PROMPTS)
    rows = list(range(len(PROMPTS)))
    wrong = 0
    for _ in range(6):
        want = decoding.expect(rows)
        got = decoding.run(StepSize(8), rows)
        wrong += not torch.allclose(got, want, atol=2e-5, rtol=2e-5)
        decoding.append(rows, want)
        flags = decoding.steps.of(StepSize(8)).buffers.flags
        flags.counters[0] -= decoding.config.num_layers  # as if the numbers were captured
    assert wrong
