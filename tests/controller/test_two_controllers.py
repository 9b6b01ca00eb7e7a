"""Two controllers side by side on real etcd: one leads, and a stopped leader does no harm when it wakes."""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

from flume_common.etcd_binary import embedded_etcd
from flume_common.store import Removed, StoreConfig, connect
from flume_controller import event_store
from flume_controller.spec import decode_spec, decode_status

sys.path.insert(0, str(Path(__file__).parent))
from history import Entry, violations

STOPPED_S = 5.0  # longer than the lease of 3 s


async def leader(store, keys):
    return decode_status((await store.get(keys.status_attention)).value).leader


@asynccontextmanager
async def recording(store, keys):
    """Every revision of the spec and the status, as a watcher of its own sees them."""
    history = []

    def note(kind, decode, kv):
        history.append(Entry(kind, decode(kv.value), kv.mod_revision))

    async def follow(kind, key, decode):
        async with store.watch(key.rpartition("/")[0] + "/") as watch:
            for kv in watch.items.values():
                note(kind, decode, kv)
            async for batch in watch:
                assert batch.resync is None, "a recorder must not miss anything"
                for change in batch.changes:
                    assert not isinstance(change, Removed)
                    note(kind, decode, change.kv)

    async with asyncio.TaskGroup() as tasks:
        followers = [
            tasks.create_task(follow("spec", keys.spec_attention, decode_spec)),
            tasks.create_task(follow("status", keys.status_attention, decode_status)),
        ]
        yield history
        await asyncio.sleep(0.3)
        for follower in followers:
            follower.cancel()


def converged(controller, replicas):
    status = controller.status()
    done = status.observed_generation == status.generation and status.ready == status.desired == replicas
    return done and len(controller.nodes()) == replicas


async def scale(controller, replicas, through):
    """Blocking calls in a thread, so that the recorder's loop goes on."""
    await asyncio.to_thread(through.scale, replicas)
    await asyncio.to_thread(controller.until, lambda: converged(controller, replicas))


async def test_a_stopped_leader_is_replaced_and_writes_nothing_when_it_wakes(two_controllers, store, keys):
    first, second = two_controllers
    assert await leader(store, keys) == "controller-1"
    async with recording(store, keys) as history:
        await scale(first, 2, through=second)  # a follower's Admin API reads and scales
        first.send(signal.SIGSTOP)
        await asyncio.gather(scale(second, 3, through=second), asyncio.sleep(STOPPED_S))
        assert await leader(store, keys) == "controller-2"
        first.send(signal.SIGCONT)
        await asyncio.sleep(1.0)
        await scale(second, 1, through=first)
        assert await leader(store, keys) == "controller-2"
    writers = [entry.value.leader for entry in history if entry.kind == "status"]
    assert violations(sorted(history, key=lambda entry: entry.revision)) == []
    assert writers == sorted(writers) and set(writers) == {"controller-1", "controller-2"}
    assert "leader_stepped_down" in first.log()
    elected = [e.source for e in await event_store.read(store, keys) if e.reason == "LeaderElected"]
    assert elected == ["controller-1", "controller-2"]


async def test_a_leader_that_is_asked_to_end_hands_over_at_once(two_controllers, store, keys):
    first, second = two_controllers
    pid = second.nodes()["attention-1"].pid
    assert first.end() == 0

    async def led_by_second():
        return await leader(store, keys) == "controller-2"

    async with asyncio.timeout(2.5):  # the lease alone would take 3 s
        while not await led_by_second():  # noqa: ASYNC110 - etcd and processes are what is waited for
            await asyncio.sleep(0.02)
    assert second.nodes()["attention-1"].pid == pid, "the nodes do not notice"
    await scale(second, 2, through=second)


async def test_a_leader_that_loses_etcd_steps_down_and_leads_again_when_it_is_back(
    start_controller, keys, tmp_path
):
    async with (
        embedded_etcd(tmp_path / "own-etcd", args=["--unsafe-no-fsync"], stop_s=0) as etcd,
        connect(StoreConfig((etcd.endpoint,))) as store,
    ):
        controller = start_controller(etcd.endpoint)
        pid = controller.nodes()["attention-1"].pid
        before = decode_status((await store.get(keys.status_attention)).value)
        os.kill(etcd.pid, signal.SIGSTOP)
        controller.until(lambda: "leader_stepped_down" in controller.log(), timeout_s=4)
        assert controller.nodes()["attention-1"].pid == pid, "what was known is still served"
        os.kill(etcd.pid, signal.SIGCONT)
        await asyncio.to_thread(controller.until, lambda: controller.log().count("leader_elected") == 2)
        await scale(controller, 2, through=controller)
        assert controller.nodes()["attention-1"].pid == pid
        after = decode_status((await store.get(keys.status_attention)).value)
        assert after.epoch > before.epoch and before.epoch > 0
    assert controller._process.poll() is None, "losing etcd ends nothing"


def test_election_timings_that_could_overlap_are_refused_at_the_start(etcd_endpoint, keys, tmp_path):
    argv = [sys.executable, "-m", "flume_controller", "--etcd", etcd_endpoint, "--data-dir", str(tmp_path)]
    argv += ["--leader-elect-lease-duration", "5s"]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=20)
    assert ended.returncode == 2 and "must be longer than the renew deadline" in ended.stderr
