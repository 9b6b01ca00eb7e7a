import asyncio

import pytest
from flume_controller.reconcile import Reconciler, Result, TerminalError
from flume_controller.workqueue import WorkQueue


class AwayError(Exception):
    pass


class OverError(Exception):
    pass


class Passes:
    """A pass that can be held open; `outcomes` are returned or raised in turn, the last one for ever."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes) or [Result()]
        self.count = 0
        self.running = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, key):
        assert key == "attention"
        self.count += 1
        self.running += 1
        assert self.running == 1, "passes never overlap"
        try:
            await self.gate.wait()
        finally:
            self.running -= 1
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


class FakeQueue(WorkQueue):
    """Remembers what was asked of it instead of waiting."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def add_after(self, key, delay_s):
        self.asked.append(("after", delay_s))

    def forget(self, key):
        super().forget(key)
        self.asked.append("forget")


def reconciler(passes, **options):
    return Reconciler(passes, ("attention",), expected=(AwayError,), stop_on=(OverError,), **options)


async def once(*outcomes, times=1):
    made = reconciler(Passes(*outcomes), queue=FakeQueue())
    for _ in range(times):
        await made.run_once("attention")
    return made


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


async def run_until(made, condition):
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(made.run())
        while not condition():  # noqa: ASYNC110 - etcd and processes are what is waited for
            await asyncio.sleep(0.001)
        running.cancel()


async def test_pokes_during_a_pass_coalesce_into_one_more():
    passes = Passes()
    passes.gate.clear()
    made = reconciler(passes)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(made.run())
        await settle()
        for _ in range(5):
            made.poke()
        passes.gate.set()
        await settle()
        running.cancel()
    assert passes.count == 2


async def test_an_error_is_tried_again_ever_later():
    made = await once(AwayError("etcd is away"), times=4)
    assert made.queue.asked == [("after", 0.005 * 2**n) for n in range(4)]
    assert made.reconcile_total == {"success": 0, "error": 4, "requeue": 0, "requeue_after": 0}
    assert (made.reconcile_errors_total, made.reconcile_panics_total) == (4, 0)


async def test_success_forgets_the_failures():
    made = await once(AwayError(), AwayError(), Result(), times=3)
    assert made.queue.asked[-1] == "forget" and made.queue.requeues("attention") == 0
    assert made.reconcile_total["success"] == 1


async def test_a_wish_for_later_forgets_the_failures_too():
    made = await once(AwayError(), Result(0.3), times=2)
    assert made.queue.asked == [("after", 0.005), "forget", ("after", 0.3)]
    assert made.reconcile_total["requeue_after"] == 1


async def test_a_terminal_error_is_counted_and_not_tried_again():
    made = await once(TerminalError("the spec is broken"))
    assert made.queue.asked == ["forget"]
    assert (made.terminal_reconcile_errors_total, made.reconcile_errors_total) == (1, 1)


async def test_an_error_of_our_own_making_is_counted_as_a_panic_and_does_not_end_the_loop():
    passes = Passes(KeyError("oops"), Result())
    made = reconciler(passes)
    await run_until(made, lambda: passes.count == 2)
    assert made.reconcile_panics_total == 1


async def test_a_pass_that_hangs_is_ended_and_counted():
    passes = Passes()
    passes.gate.clear()
    made = reconciler(passes, timeout_s=0.01, queue=FakeQueue())
    await made.run_once("attention")
    assert (made.reconcile_timeouts_total, made.reconcile_panics_total) == (1, 0)
    assert made.queue.asked == [("after", 0.005)]


async def test_what_ends_a_term_ends_the_loop():
    with pytest.raises(OverError):
        async with asyncio.timeout(5):
            await reconciler(Passes(OverError())).run()


async def test_it_runs_again_after_the_resync_without_a_poke():
    passes = Passes()
    await run_until(reconciler(passes, resync_s=0.01), lambda: passes.count >= 3)


async def test_a_resync_comes_while_the_back_off_still_waits():
    """A broken spec or an etcd that was away for long must not silence the controller for 1000 s."""
    passes = Passes(*[AwayError()] * 12, Result())
    made = reconciler(passes, resync_s=0.01)
    await run_until(made, lambda: made.reconcile_total["success"] >= 1)
