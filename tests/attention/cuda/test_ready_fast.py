"""An engine on a GPU forked from a zygote that was preloaded: what is left for it to do, and how long that
takes. The GPU is simulated."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys

import beside
import psutil
import pytest
from fake_weight_node import LAYOUT, FakeWeightNode
from flume_attention.messages import FromEngine, Started
from flume_common.engine_link import run_engine
from flume_common.lanes import Port
from flume_common.zygote import abstract_name, bind
from real_engine import ENV, Node

KV_BYTES = 32 * LAYOUT.block_bytes
HEAVY = ("flume_", "torch", "triton", "ucxx", "numpy")
ONLY_IN_TESTS = {
    "flume_kernels.reference",
    "flume_kernels.gpu.reference",
    "flume_kernels.gpu.direct_reference",
}


@pytest.fixture
def zygote(tmp_path):
    """The name of its engines' socket, and what it has said so far."""
    names = [abstract_name(kind, tmp_path) for kind in ("supervisors", "engines")]
    with bind(names[0]) as supervisors, bind(names[1]) as engines, (tmp_path / "log").open("wb") as log:
        fds = supervisors.fileno(), engines.fileno()
        flags = ["--supervisors-fd", str(fds[0]), "--engines-fd", str(fds[1]), "--preload", "cuda"]
        process = subprocess.Popen(
            [sys.executable, "-m", "flume_attention.zygote", *flags], pass_fds=fds, stderr=log,
            env=beside.environment(),
        )  # fmt: skip

    def events():
        lines = (tmp_path / "log").read_text().splitlines()
        return [json.loads(line)["event"] for line in lines if line.startswith("{")]

    yield names[1], events
    process.terminate()
    process.wait(timeout=10)


async def test_an_engine_of_a_preloaded_zygote_imports_and_compiles_nothing(zygote, tmp_path):
    name, events = zygote
    async with asyncio.timeout(60):
        while events().count("zygote_ready") < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert "preloaded" in events(), events()
    env = beside.environment() | ENV | {"TOLD_FILE": str(tmp_path / "told")}
    args = ["--kv-bytes", str(KV_BYTES), "--device", "cuda"]
    async with run_engine("simulated_gpu_imports", args, inbox=FromEngine, env=env, zygote=name) as engine:
        node = Node(engine)
        started = await node.expect(Started, timeout_s=60)
        assert psutil.Process(engine.pid).ppid() != os.getpid(), "a fork of the zygote"
        with Port() as port:
            w = await node.attach(FakeWeightNode(port))
            w.step((0, 0, 5), ops=[w.open(0)])
            w.step((0, 1, 1))
    assert [*started.phases_ms] == ["device", "kv_memory", "first_kernel", "port"]
    told = json.loads((tmp_path / "told").read_text())
    assert "simulated_gpu_attention" in told["imported"]
    assert {each for each in told["imported"] if each.startswith(HEAVY)} <= ONLY_IN_TESTS
    assert told["ran"] == [] and not told["driver_loaded"]
