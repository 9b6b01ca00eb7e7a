import asyncio

from flume_controller.reconcile import Reconciler


class Passes:
    """A pass that can be held open and made to fail."""

    def __init__(self, failures=0, wish_s=None):
        self.count = 0
        self.failures = failures
        self.wish_s = wish_s
        self.gate = asyncio.Event()
        self.gate.set()
        self.third = asyncio.Event()

    async def __call__(self):
        self.count += 1
        if self.count == 3:
            self.third.set()
        await self.gate.wait()
        if self.count <= self.failures:
            raise RuntimeError("etcd is away")
        return self.wish_s


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


async def test_pokes_during_a_pass_coalesce_into_one_more():
    passes = Passes()
    passes.gate.clear()
    reconciler = Reconciler(passes)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(reconciler.run())
        await settle()
        for _ in range(5):
            reconciler.poke()
        passes.gate.set()
        await settle()
        running.cancel()
    assert passes.count == 2


async def test_failures_back_off_and_success_forgets_them():
    reconciler = Reconciler(Passes(failures=4), resync_s=30, backoff_s=0.5, backoff_cap_s=3)
    assert [await reconciler.run_once() for _ in range(6)] == [0.5, 1.0, 2.0, 3, 30, 30]


async def test_a_pass_may_ask_for_the_next_one_sooner_but_not_later_than_the_resync():
    assert await Reconciler(Passes(wish_s=0.3), resync_s=30).run_once() == 0.3
    assert await Reconciler(Passes(wish_s=60), resync_s=30).run_once() == 30


async def test_it_runs_again_after_the_resync_without_a_poke():
    passes = Passes()
    reconciler = Reconciler(passes, resync_s=0.01)
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(reconciler.run())
        await passes.third.wait()
        running.cancel()
