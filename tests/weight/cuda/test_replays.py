"""Many replays through the driver, with routes that change, nodes that stall and steps that fail.

The device is integers: a step is captured as a list of operations, counts as the kernels do and interleaves
with the driver at random. A wrong, stale or doubled message gives a wrong token, as every value depends on
the one before. FLUME_TEST_REPLAYS=100000 takes 30 s.

Over frames the driver answers for the nodes. Direct, nodes are devices of their own that see a step late, may
answer one that was abandoned, and meet the first one in flags and numbers alone.
"""

import os
import random
from collections import deque
from types import SimpleNamespace

import pytest
from flume_common.direct_region import mark
from flume_kernels.gpu.flags import FLAG_STRIDE_BYTES, POISON, WORDS_PER_FLAG, FlagBlock
from flume_kernels.gpu.watchdog import Watchdog
from flume_weight.cuda.captured_steps import CapturedStep
from flume_weight.cuda.driver import StepDriver
from flume_weight.cuda.errors import StepTimedOut

REPLAYS = int(os.environ.get("FLUME_TEST_REPLAYS", "10000"))
LAYERS = 2
PRIME = (1 << 31) - 1
TIMEOUT_S = 0.05


def mixed(*values):
    result = 17
    for value in values:
        result = (result * 1_000_003 + value) % PRIME
    return result


class IntegerStep:
    """Flags, a device that counts on them, and a step: hidden -> query -> partial -> hidden, LAYERS times."""

    def __init__(self, microbatches, seed):
        self.random = random.Random(seed)
        self.count = microbatches
        memory = memoryview(bytearray((2 * microbatches + 1) * FLAG_STRIDE_BYTES))
        self.words = memory.cast("q")
        self.flags = SimpleNamespace(host=FlagBlock(memory, microbatches, microbatches + 1), rearm=self.rearm)
        self.counters = [0] * (2 * microbatches + 1)
        self.status = 0
        self.queue = deque()
        self.inputs, self.hidden = [0] * microbatches, [0] * microbatches
        self.queries, self.partials, self.tokens = [0] * microbatches, [0] * microbatches, [0] * microbatches
        self.keys = [[0] * LAYERS for _ in range(microbatches)]
        self.captured = list(self.record())

    def record(self):
        for number in range(self.count):
            yield lambda number=number: self.begin(number)
            yield from self.ask(number, 0)
        for layer in range(LAYERS):
            for number in range(self.count):
                yield from self.hear(number, layer)
                if layer + 1 < LAYERS:
                    yield from self.ask(number, layer + 1)
        yield self.end
        yield lambda: self.signal(2 * self.count)

    def ask(self, number, layer):
        yield lambda: self.project(number)
        yield lambda: self.signal(self.count + number)
        yield lambda: self.store(number, layer)
        if layer + 1 == LAYERS:
            yield lambda: self.signal(self.count + number)

    def hear(self, number, layer):
        yield lambda: self.await_(number)
        yield lambda: self.answer(number)

    def begin(self, number):
        self.hidden[number] = self.inputs[number]

    def project(self, number):
        self.queries[number] = mixed(self.hidden[number], 1)

    def store(self, number, layer):
        self.keys[number][layer] = mixed(self.hidden[number], 2)

    def answer(self, number):
        self.hidden[number] = mixed(self.hidden[number], self.partials[number])

    def end(self):
        self.tokens = list(self.hidden)

    def signal(self, flag):
        self.counters[flag] += 1
        self.words[flag * WORDS_PER_FLAG] = POISON if self.status else self.counters[flag]

    def await_(self, flag):
        seen = self.words[flag * WORDS_PER_FLAG]
        if seen < self.counters[flag] + 1:
            return False
        self.counters[flag] += 1
        self.status |= seen >= POISON
        return True

    def rearm(self):
        assert not self.queue
        self.counters, self.status = [0] * len(self.counters), 0
        self.flags.host.rearm()

    def launch(self):
        assert not self.queue, "launched while the last replay runs"
        self.queue.extend(self.captured)

    def run_some(self, count):
        for _ in range(count):
            if not self.queue or self.queue[0]() is False:
                return
            self.queue.popleft()

    def done(self):
        self.run_some(8)
        return not self.queue


class DirectIntegerStep(IntegerStep):
    """It asks by a table of nodes, and takes their answers from there. `step` is the number of the step."""

    def __init__(self, seed):
        self.step, self.table = 0, []
        super().__init__(1, seed)

    def ask(self, number, layer):
        yield lambda: self.project(number)
        yield self.push
        yield lambda: self.raise_flags(layer)
        yield lambda: self.signal(self.count + number)
        yield lambda: self.store(number, layer)
        if layer + 1 == LAYERS:
            yield lambda: self.signal(self.count + number)

    def hear(self, number, layer):
        yield lambda: self.await_flags(layer)
        yield self.merge
        yield lambda: self.answer(number)

    def push(self):
        for node in self.table:
            node.query = self.queries[0]

    def raise_flags(self, layer):
        for node in self.table:
            if not self.status:
                node.asked = mark(self.step, layer)

    def await_flags(self, layer):
        if self.status or all(node.answered >= mark(self.step, layer) for node in self.table):
            return True
        self.status = int(self.words[0] >= POISON)
        return bool(self.status)

    def merge(self):
        self.partials[0] = sum(node.partial for node in self.table) % PRIME


class DirectNode:
    """A device that answers the layers of the step it knows of, in order."""

    def __init__(self):
        self.asked = self.answered = self.query = self.partial = 0
        self.step = self.layer = 0
        self.held, self.stalls_at = [], None

    def begin(self, step, held):
        self.step, self.layer, self.held = step, 0, list(held)

    def move_on(self):
        if self.layer in (LAYERS, self.stalls_at) or self.asked < mark(self.step, self.layer):
            return
        self.partial = sum(mixed(self.query, self.layer, each) for each in self.held)
        self.answered = mark(self.step, self.layer)
        self.layer += 1


class Nodes:
    """What the attention nodes answer: a sum over what they hold, which no cut of it into routes changes."""

    def __init__(self, step):
        self.step = step
        self.random = step.random
        self.held = list(range(1, 6))  # of every sequence, in every layer
        self.route = [self.held]
        self.late = [0] * step.count
        self.asked = [None] * step.count
        self.stalled = None  # (microbatch, layer) that is never answered
        self.sent_keys = {}

    def change_route(self):
        cut = self.random.randint(0, len(self.held))
        self.route = [self.held[:cut], self.held[cut:]]

    def begin(self):
        self.sent_keys.clear()
        self.queries = 0
        self.asked = [None] * self.step.count

    def progress(self):
        self.step.run_some(self.random.randint(0, 9))

    def query(self, microbatch, layer):
        assert (layer, microbatch) == divmod(self.queries, self.step.count), "out of turn"
        self.queries += 1
        self.asked[microbatch] = layer, self.step.queries[microbatch]
        self.late[microbatch] = self.random.randint(0, 3)

    def arrived(self, microbatch, layer):
        asked_layer, query = self.asked[microbatch]
        assert asked_layer == layer
        if self.stalled == (microbatch, layer):
            return False
        if self.late[microbatch]:
            self.late[microbatch] -= 1
            return False
        parts = [sum(mixed(query, layer, held) for held in each) for each in self.route]
        self.step.partials[microbatch] = sum(parts) % PRIME
        return True

    def keys(self, microbatch, layer):
        self.sent_keys[microbatch, layer] = self.step.keys[microbatch][layer]


class DirectNodes(Nodes):
    """The same answers, by two devices that see each step some while after it began."""

    def __init__(self, step):
        super().__init__(step)
        self.devices = [DirectNode(), DirectNode()]
        self.plans = []

    def begin(self):
        super().begin()
        self.step.step += 1
        self.step.table = self.devices[: len(self.route)]
        self.plans = [
            (device, self.step.step, held) for device, held in zip(self.step.table, self.route, strict=True)
        ]
        stalled = self.stalled[1] if self.stalled else None
        for device in self.devices:
            device.stalls_at = stalled if device is self.step.table[-1] else None

    def progress(self):
        super().progress()
        for device in self.devices:
            for _ in range(self.random.randint(0, 2)):
                device.move_on()
        if self.plans and self.random.random() < 0.4:
            device, number, held = self.plans.pop()
            device.begin(number, held)

    def query(self, microbatch, layer):
        pass

    def arrived(self, microbatch, layer):
        return True


def expected(token, held):
    """The next token and the keys of one sequence, without any of it."""
    hidden, keys = token, []
    for layer in range(LAYERS):
        query = mixed(hidden, 1)
        keys.append(mixed(hidden, 2))
        hidden = mixed(hidden, sum(mixed(query, layer, each) for each in held) % PRIME)
    return hidden, keys


@pytest.mark.parametrize("way", ["frames", "two microbatches", "direct"])
def test_no_wrong_token_and_no_hang_through_route_changes_and_stalls(way):
    microbatches = 2 if way == "two microbatches" else 1
    if way == "direct":
        integers = DirectIntegerStep(seed=3)
        nodes = DirectNodes(integers)
    else:
        integers = IntegerStep(microbatches, seed=microbatches)
        nodes = Nodes(integers)
    choose = integers.random.random
    step = CapturedStep(SimpleNamespace(flags=integers.flags), integers, LAYERS)
    tokens = [number + 1 for number in range(microbatches)]
    stalls = failures = 0
    with Watchdog() as watchdog:
        driver = StepDriver(watchdog, TIMEOUT_S)
        for _ in range(REPLAYS // 2):
            if choose() < 0.3:
                nodes.change_route()
            if choose() < 0.001:
                stalls += 1
                nodes.stalled = integers.random.randrange(microbatches), integers.random.randrange(LAYERS)
            integers.inputs = list(tokens)
            while True:
                nodes.begin()
                try:
                    driver.run(step, nodes)
                    break
                except StepTimedOut:  # on a busy machine without a stall, too; it must do no harm either way
                    failures += 1
                    nodes.stalled = None
            wanted = [expected(token, nodes.held) for token in tokens]
            assert integers.tokens == [token for token, _ in wanted]
            assert nodes.sent_keys == {
                (number, layer): key
                for number, (_, keys) in enumerate(wanted)
                for layer, key in enumerate(keys)
            }
            tokens = integers.tokens
    assert failures >= stalls > 0
    assert step.replays == REPLAYS // 2 + failures
