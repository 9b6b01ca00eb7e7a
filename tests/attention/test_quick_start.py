"""Attention nodes that start quickly: a standby that is called, and forks of the real zygote."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import uuid
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from fake_weight_node import LAYOUT, FakeWeightNode
from flume_attention.zygote import SUPERVISOR_MODULE
from flume_common.lanes import Port
from flume_common.membership import Role, watch_members
from flume_common.serving import channel
from flume_common.standby import call
from flume_common.zygote import Fork, abstract_name, fork
from flume_controller import processes
from flume_controller.processes import RecordDir
from flume_controller.providers import standby
from flume_controller.providers.local import local_provider
from flume_controller.supervise import kill_all, sweep
from flume_protos.v1 import attention_pb2 as pb
from flume_protos.v1 import attention_pb2_grpc as rpc
from test_node_process import attach, attention_node, enlisted, eventually

pytestmark = pytest.mark.e2e
KV_BYTES = 32 * LAYOUT.block_bytes


async def serves(address, store, keys):
    """A step goes through."""
    with Port() as port:
        async with channel(address) as opened:
            stub = rpc.AttentionStub(opened)
            weight_node = await enlisted(store, keys, FakeWeightNode(port))
            await attach(stub, weight_node)
            weight_node.step((0, 0, 10), ops=[weight_node.open(0)])
            weight_node.step((0, 1, 1))
            weight_node.plan(ops=[weight_node.release(0)])
            await eventually(lambda: _is_empty(stub))
            request = pb.DetachRequest(weight_node=weight_node.name, epoch=weight_node.epoch)
            await stub.Detach(request, timeout=5)


async def _is_empty(stub):
    return not (await stub.Stats(pb.StatsRequest(), timeout=5)).used_tokens


async def test_a_standby_joins_nothing_until_called_and_is_then_ready_at_once(etcd_endpoint, store, keys):
    name = f"flume-test-{uuid.uuid4().hex}"
    async with attention_node(etcd_endpoint, store, keys, "--standby", name) as node:
        await eventually(lambda: any(line["event"] == "standby_ready" for line in node.log))
        assert not node.members.current
        began_s = time.monotonic()
        assert await call(name, "b7") == node.process.pid
        member = await eventually(
            lambda: (m := node.members.current.get((Role.ATTENTION, "b7"))) and m.state == "READY" and m
        )
        took_s = time.monotonic() - began_s
        print(f"from the call to READY {1e3 * took_s:.0f} ms")
        assert took_s < 1.0
        await serves(member.address, store, keys)
        assert node.log[-1]["node"] == "b7"
        assert "b7" in " ".join(psutil.Process(node.process.pid).cmdline())
        assert await node.stop() == 0


async def test_a_standby_ends_when_told_to_and_its_engine_with_it(etcd_endpoint, store, keys):
    async with attention_node(etcd_endpoint, store, keys, "--standby", f"flume-{uuid.uuid4().hex}") as node:
        await eventually(lambda: any(line["event"] == "standby_ready" for line in node.log))
        engine = psutil.Process(node.engine_pid)
        await node.stop(timeout_s=3)
        await eventually(lambda: is_gone(engine), 5)


class Machine:
    """A local provider of real attention nodes with a zygote, and what it made."""

    def __init__(self, folder, provider, members):
        self.folder = folder
        self.provider = provider
        self._members = members

    def log(self, name):
        path = self.folder / "logs" / f"{name}.log"
        return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]

    @property
    def zygote_pid(self):
        return RecordDir(self.folder / "run").load("zygote").pid

    async def ready(self, node):
        """The member, started if it was not."""
        await self.provider.start(node)
        return await eventually(
            lambda: (m := self._members.current.get((Role.ATTENTION, node))) and m.state == "READY" and m
        )

    def engine(self, node):
        pid = next(line["engine_pid"] for line in self.log(node) if line["event"] == "engine_started")
        return psutil.Process(pid)


@asynccontextmanager
async def machine(folder, etcd_endpoint, store, keys, **options):
    def command(node):
        return (
            *(sys.executable, "-m", "flume_attention", "--cluster", keys.cluster, "--node", node),
            *("--etcd", etcd_endpoint, "--kv-memory", str(KV_BYTES), "--prefill-threads", "1"),
        )

    try:
        async with (
            watch_members(store, keys) as members,
            local_provider(command, folder, zygote=True, **options) as provider,
        ):
            yield Machine(folder, provider, members)
    finally:
        kill_all(RecordDir(folder / "run"))
        try:
            await eventually(lambda: not _of(keys.cluster), 5)
        finally:
            for process in _of(keys.cluster):
                process.kill()


def is_gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def _of(cluster):
    return [p for p in psutil.process_iter(["cmdline"]) if cluster in " ".join(p.info["cmdline"] or [])]


@pytest_asyncio.fixture
async def local(tmp_path, etcd_endpoint, store, keys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    async with machine(tmp_path, etcd_endpoint, store, keys) as made:
        yield made


async def draw(local):
    """What a fork of the engines' zygote draws first."""
    text = "import torch\ndef main():\n    print(torch.rand(4).tolist())\n"
    (local.folder / "flume_test_draw.py").write_text(text)
    path = local.folder / "numbers"
    request = Fork(module="flume_test_draw", args=[], env=dict(os.environ))
    with path.open("wb") as file:
        child = await fork(_names(local.folder)[1], request, (file.fileno(), 2))
        assert await child.wait() == 0
    return path.read_text()


async def test_nodes_are_forked_and_outlive_the_zygote_without_which_others_are_run_anew(local, store, keys):
    one, two = await local.ready("attention-1"), await local.ready("attention-2")
    await serves(one.address, store, keys)
    await serves(two.address, store, keys)
    supervisor, engine = psutil.Process(one.pid), local.engine("attention-1")
    assert supervisor.ppid() == local.zygote_pid and os.getpgid(one.pid) == one.pid
    assert engine.parent().ppid() == local.zygote_pid, "of the second stage"
    assert os.getpgid(engine.pid) == one.pid
    assert "--node attention-1" in " ".join(supervisor.cmdline())
    assert not any("torch" in region.path for region in supervisor.memory_maps())
    started = [line["elapsed_ms"] for line in local.log("attention-2") if line["event"] == "state"]
    print(f"second node READY {started[0]} ms after its fork")
    assert await draw(local) != await draw(local), "random numbers"

    os.kill(local.zygote_pid, signal.SIGKILL)
    await eventually(lambda: not psutil.pid_exists(engine.parent().pid) or engine.ppid() != local.zygote_pid)
    three = await local.ready("attention-3")
    for node in (one, two, three):
        await serves(node.address, store, keys)
    assert psutil.Process(three.pid).ppid() == os.getpid()

    engine.kill()
    await eventually(
        lambda: [line["event"] for line in local.log("attention-1")].count("engine_started") == 2
    )
    assert "zygote_unavailable" in [line["event"] for line in local.log("attention-1")]
    await serves(one.address, store, keys)


async def test_everything_ends_in_order_and_nothing_is_left(local):
    node = await local.ready("attention-1")
    engine, zygote = local.engine("attention-1"), psutil.Process(local.zygote_pid)
    stages = zygote.children()
    assert _sockets(local.folder), "the test shows nothing"
    await sweep(RecordDir(local.folder / "run"), 5.0)
    await eventually(lambda: all(is_gone(p) for p in (zygote, engine, *stages)), 5)
    # Its parent may be gone before having reaped it; then another one does, a little later.
    await eventually(lambda: not psutil.pid_exists(node.pid), 5)
    assert not any(processes.is_alive(record) for record in RecordDir(local.folder / "run").all())
    assert not _sockets(local.folder)


def _names(folder):
    return [abstract_name(kind, folder / "run") for kind in ("supervisors", "engines")]


def _sockets(folder):
    listed = Path("/proc/net/unix").read_text()
    return [name for name in _names(folder) if name in listed]


async def test_a_standby_of_the_zygote_is_taken_and_replaced(
    tmp_path, etcd_endpoint, store, keys, monkeypatch
):
    monkeypatch.setattr(standby, "PAUSE_S", 0.1)
    async with machine(tmp_path, etcd_endpoint, store, keys, num_standbys=1) as local:
        keeping = asyncio.create_task(local.provider.keep_ready())
        records = RecordDir(tmp_path / "run")
        try:
            await eventually(lambda: (tmp_path / "logs" / "standby-1.log").exists())
            await eventually(lambda: "standby_ready" in {line["event"] for line in local.log("standby-1")})
            waiting = records.load("standby-1")
            began_s = time.monotonic()
            node = await local.ready("attention-1")
            print(f"from start to READY {1e3 * (time.monotonic() - began_s):.0f} ms")
            assert node.pid == waiting.pid
            await serves(node.address, store, keys)
            await eventually(lambda: (r := records.load("standby-1")) and r.pid != waiting.pid)
        finally:
            keeping.cancel()


def test_what_is_forked_is_what_the_command_line_runs():
    assert SUPERVISOR_MODULE == "flume_attention.__main__"
