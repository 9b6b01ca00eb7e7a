"""Two controllers side by side on real etcd: one leads, and a stopped leader does no harm when it wakes."""

import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from flume_common.etcd_binary import embedded_etcd
from flume_common.membership import Member, Role, State, register, watch_members
from flume_common.route_store import RouteWriter
from flume_common.routes import Route
from flume_common.store import StoreConfig, connect
from flume_common.tasks import background
from flume_controller import event_store
from flume_controller.spec import decode_status

sys.path.insert(0, str(Path(__file__).parent))
from election_timing import QUICK_ELECTION
from recorder import ClusterHistory
from route_history import Written


async def leader(store, keys):
    return decode_status((await store.get(keys.status_attention)).value).leader


class WeightNode:
    """A weight node without a model: sequences begin, move their tails to ready nodes, and end."""

    def __init__(self, registration, writer, members):
        self._epoch, self._name = registration.epoch, registration.member.id
        self._writer, self._members = writer, members
        self._routes = {}
        self._random = random.Random(self._name)

    async def run(self):
        for number in itertools.count():
            ready = [m.id for m in self._members.of(Role.ATTENTION) if m.state is State.READY]
            if ready:
                self._step(number, ready)
            await asyncio.sleep(0.02)

    def _step(self, number, ready):
        node, sequence = self._random.choice(ready), f"{self._name}-{number // 40}"
        route = self._routes.get(sequence)
        if route is None:
            for old in list(self._routes):
                del self._routes[old]
                self._writer.end(old)
            route = Route.start(sequence, self._name, self._epoch, node)
        else:
            route = route.move_tail(route.tail.start + 10, node)
        for item in route.ranges[:-1]:
            if item.node not in ready:  # as a node that leaves is emptied
                route = route.replace_holder(item.start, item.end, node)
        self._routes[sequence] = route
        self._writer.put(route)


@asynccontextmanager
async def weight_node(store, keys, name):
    member = Member(
        id=name, role=Role.WEIGHT, state=State.READY, address="x:1", host="here", pid=1, version="0",
        protocol_version=1, started_at_s=time.time(),
    )  # fmt: skip
    async with (
        watch_members(store, keys) as members,
        register(store, keys, member) as registration,
        RouteWriter(store, keys, registration) as writer,
        background(sequences=WeightNode(registration, writer, members).run()),
    ):
        yield


def converged(controller, replicas):
    status = controller.status()
    done = status.observed_generation == status.generation and status.ready == status.desired == replicas
    return done and len(controller.nodes()) == replicas


async def scale(controller, replicas, through):
    """Blocking calls in a thread, so that the recorder's loop goes on."""
    await asyncio.to_thread(through.scale, replicas)
    await asyncio.to_thread(controller.until, lambda: converged(controller, replicas), 40.0)


@pytest.mark.parametrize(
    "options, stopped_s",
    [
        pytest.param(QUICK_ELECTION, 5.0, id="lease of 3 s"),
        pytest.param((), 20.0, id="default timing", marks=pytest.mark.soak),
    ],
)
async def test_a_stopped_leader_is_replaced_and_writes_nothing_when_it_wakes(
    start_controller, etcd_endpoint, store, keys, options, stopped_s
):
    first = start_controller(etcd_endpoint, "controller-1", options)
    second = start_controller(etcd_endpoint, "controller-2", options)
    assert await leader(store, keys) == "controller-1"
    async with (
        ClusterHistory(store, keys) as history,
        weight_node(store, keys, "weight-1"),
        weight_node(store, keys, "weight-2"),
    ):
        await scale(first, 2, through=second)  # a follower's Admin API reads and scales
        first.send(signal.SIGSTOP)
        await asyncio.gather(scale(second, 3, through=second), asyncio.sleep(stopped_s))
        assert await leader(store, keys) == "controller-2"
        first.send(signal.SIGCONT)
        await asyncio.sleep(1.0)
        await scale(second, 1, through=first)
        assert await leader(store, keys) == "controller-2"
        assert await history.settled() == [] and history.gaps == []
    (entries,) = history.specs
    writers = [entry.value.leader for entry in entries if entry.kind == "status"]
    assert writers == sorted(writers) and set(writers) == {"controller-1", "controller-2"}
    assert [entry.value.desired for entry in entries if entry.kind == "spec"] == [1, 2, 3, 1]
    assert len({entry.sequence for _, entry in history.routes if isinstance(entry, Written)}) > 10
    assert "leader_stepped_down" in first.log()
    elected = [e.source for e in await event_store.read(store, keys) if e.reason == "LeaderElected"]
    assert elected == ["controller-1", "controller-2"]


async def test_a_leader_that_is_asked_to_end_hands_over_at_once(two_controllers, store, keys):
    first, second = two_controllers
    pid = second.nodes()["attention-1"].pid
    second.scale(2)
    second.until_states(a1="READY", a2="READY")
    os.kill(second.nodes()["attention-2"].pid, signal.SIGKILL)
    # The follower knows as the leader does that it is gone, long before its lease has run out.
    second.until(lambda: "attention-2" not in second.states(), timeout_s=1.5)
    second.scale(1)
    second.until_states(a1="READY")
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
