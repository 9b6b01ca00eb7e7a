"""client-go's rules, as a model that any sequence of calls is compared with, and the schedule of retries."""

import asyncio

import pytest
from flume_controller.workqueue import RateLimiter, ShutDown, WorkQueue
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


KEYS = st.sampled_from("abcd")


class QueueRules(RuleBasedStateMachine):
    """The model: what is owed work, who is at work, and in which order the rest comes."""

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.loop = asyncio.new_event_loop()
        self.queue = WorkQueue(clock=self.clock)
        self.waiting = []  # in order
        self.busy = set()
        self.again = set()  # added while busy
        self.shut = False

    @rule(key=KEYS)
    def add(self, key):
        self.queue.add(key)
        if self.shut or key in self.waiting or key in self.again:
            return
        if key in self.busy:
            self.again.add(key)
        else:
            self.waiting.append(key)

    def teardown(self):
        self.loop.close()

    async def take_now(self):
        """The next key, or None when `get` waits."""
        getting = asyncio.create_task(self.queue.get())
        await asyncio.sleep(0)
        if not getting.done():
            getting.cancel()
            return None
        return getting.result()

    def take(self):
        return self.loop.run_until_complete(self.take_now())

    @precondition(lambda self: self.waiting)
    @rule()
    def get(self):
        key = self.take()
        assert key == self.waiting.pop(0), "first come, first served"
        assert key not in self.busy, "one key is never worked on twice at once"
        self.busy.add(key)

    @precondition(lambda self: self.busy)
    @rule(data=st.data())
    def done(self, data):
        key = data.draw(st.sampled_from(sorted(self.busy)))
        self.clock.now_s += 1
        self.queue.done(key)
        self.busy.remove(key)
        if key in self.again:
            self.again.remove(key)
            self.waiting.append(key)

    @rule(key=KEYS)
    def done_without_get_is_an_error(self, key):
        if key not in self.busy:
            with pytest.raises(KeyError):
                self.queue.done(key)

    @precondition(lambda self: not self.waiting)
    @rule()
    def nothing_to_get(self):
        if self.shut:
            with pytest.raises(ShutDown):
                self.take()
        else:
            assert self.take() is None

    @rule()
    def shut_down(self):
        self.queue.shut_down()
        self.shut = True

    @invariant()
    def agree(self):
        assert self.queue.depth == len(self.waiting)
        assert (self.queue.longest_running_processor_seconds > 0) <= bool(self.busy)
        assert self.queue.adds_total == self.queue.queue_duration_seconds.count + len(self.waiting) + len(
            self.again
        )


QueueRules.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestQueueRules = QueueRules.TestCase


def test_a_key_waits_5_ms_doubled_with_each_failure_up_to_1000_s():
    limiter = RateLimiter(Clock())
    schedule_s = [limiter.when_s("a") for _ in range(20)]
    assert schedule_s == [pytest.approx(min(0.005 * 2**failures, 1000.0)) for failures in range(20)]
    assert schedule_s[17:] == [pytest.approx(655.36), 1000.0, 1000.0]
    limiter.forget("a")
    assert limiter.when_s("a") == 0.005
    assert limiter.when_s("b") == 0.005, "keys fail on their own"


def test_after_a_burst_of_100_all_keys_together_get_10_per_second():
    clock = Clock()
    limiter = RateLimiter(clock)
    delays_s = [limiter.when_s(number) for number in range(110)]
    assert delays_s[:100] == [0.005] * 100
    assert delays_s[100:] == [pytest.approx(0.1 * number) for number in range(1, 11)]
    clock.now_s += 2.0
    assert limiter.when_s("x") == 0.005, "10 owed and 10 refilled: one more is free"
    clock.now_s += 1000.0
    assert [limiter.when_s(f"y{number}") for number in range(101)][-1] == pytest.approx(0.1), "it has a cap"


def test_a_thousand_failures_wait_the_cap_and_no_longer():
    clock = Clock()
    limiter = RateLimiter(clock)
    for _ in range(1000):
        clock.now_s += 1000.0
        last_s = limiter.when_s("a")
    assert last_s == 1000.0


async def test_of_several_waits_for_one_key_the_shortest_counts():
    queue = WorkQueue()
    queue.add_after("a", 30)
    queue.add_after("a", 0.01)
    queue.add_after("a", 20)
    async with asyncio.timeout(5):
        assert await queue.get() == "a"
    queue.done("a")
    await asyncio.sleep(0.02)
    assert queue.depth == 0, "the longer waits are gone"


async def test_a_wait_of_nothing_adds_at_once():
    queue = WorkQueue()
    queue.add_after("a", 0)
    assert queue.depth == 1


async def test_a_failure_is_added_again_after_its_delay_and_counted():
    queue = WorkQueue()
    assert queue.add_rate_limited("a") == 0.005
    assert (queue.depth, queue.retries_total, queue.requeues("a")) == (0, 1, 1)
    async with asyncio.timeout(5):
        assert await queue.get() == "a"
    queue.forget("a")
    assert queue.requeues("a") == 0


async def test_shutting_down_with_drain_waits_for_what_was_begun_and_what_waits():
    queue = WorkQueue()
    queue.add("a")
    queue.add("b")
    queue.add_after("c", 0.001)
    await queue.get()
    drained = asyncio.create_task(queue.shut_down_with_drain())
    await asyncio.sleep(0.01)
    queue.add("d")
    queue.done("a")
    await asyncio.sleep(0)
    assert not drained.done() and await queue.get() == "b"
    queue.done("b")
    async with asyncio.timeout(5):
        await drained
    with pytest.raises(ShutDown):
        await queue.get()


async def test_every_waiting_worker_hears_of_the_end():
    queue = WorkQueue()
    workers = [asyncio.create_task(queue.get()) for _ in range(3)]
    await asyncio.sleep(0)
    queue.shut_down()
    results = await asyncio.gather(*workers, return_exceptions=True)
    assert all(isinstance(result, ShutDown) for result in results)


async def test_two_workers_never_have_the_same_key_and_each_addition_is_worked_on():
    queue = WorkQueue()
    at_work, seen = set(), []

    async def work():
        while True:
            key = await queue.get()
            assert key not in at_work
            at_work.add(key)
            await asyncio.sleep(0)
            seen.append(key)
            at_work.remove(key)
            queue.done(key)

    async with asyncio.TaskGroup() as tasks:
        workers = [tasks.create_task(work()) for _ in range(2)]
        for round in range(50):
            queue.add("ab"[round % 2])
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        for worker in workers:
            worker.cancel()
    assert queue.depth == 0 and set(seen) == {"a", "b"}
    assert queue.work_duration_seconds.count == len(seen) == queue.adds_total
