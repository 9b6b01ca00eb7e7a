"""READY means that it can serve: ghosts count for nothing, and a cluster without a lane says so."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from flume_common.keys import Keys
from flume_common.membership import Role
from flume_common.store import StoreConfig, connect

sys.path.insert(0, str(Path(__file__).parent))
from clusters import Cluster, running

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
KEYS = Keys("default")
BODY = {"model": "smollm2-135m", "prompt": "Hello", "max_tokens": 4}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A cluster that nobody else uses, with canaries every second."""
    with running(tmp_path_factory.mktemp("ready"), "--attention", "1") as cluster:
        cluster.flumectl("config", "set", "canary_interval_s=1", "unavailable_wait_s=2")
        yield cluster


def get(cluster: Cluster, path: str, body: object = None) -> tuple[int, str]:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(
        f"{cluster.url}{path}", data, {"content-type": "application/json"} if body else {}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def ready(cluster: Cluster, status: int) -> bool:
    return get(cluster, "/readyz")[0] == status


def available(cluster: Cluster) -> tuple[str, str]:
    found = next(item for item in cluster.status().conditions if item.type == "Available")
    return found.status, found.reason


def pids(cluster: Cluster) -> dict[str, int]:
    return {node.id: node.pid for node in cluster.nodes() if node.state == "READY"}


async def test_ghosts_stop_no_node_and_no_request(own):
    before = pids(own)
    async with connect(StoreConfig((f"127.0.0.1:{own.etcd_port}",))) as store:
        for role, node in ((Role.ATTENTION, "attention-1"), (Role.WEIGHT, "weight-1")):
            real = json.loads((await store.get(KEYS.member(role, node))).value)
            here = {**real, "id": "ghost-here", "lanes": ["ghost-here"]}
            nowhere = {**here, "id": "ghost-nowhere", "address": "127.0.0.1:1"}
            for ghost in (here, nowhere):
                await store.put(KEYS.member(role, ghost["id"]), json.dumps(ghost).encode())
        until_s = time.monotonic() + 20
        while time.monotonic() < until_s:
            status, said = get(own, "/v1/completions", BODY)
            assert status == 200, said
            assert available(own) == ("True", "EnoughNodes")
            await asyncio.sleep(0.5)
        states = {node.id: f"{node.state} {node.reason}" for node in own.nodes("attention")}
        assert states["ghost-here"] == states["ghost-nowhere"] == "UNREACHABLE NoLane", states
        assert {name: pid for name, pid in pids(own).items() if name in before} == before
        assert own.status().ready == 1
        for role in (Role.ATTENTION, Role.WEIGHT):
            await store.delete(KEYS.member(role, "ghost-here"))
            await store.delete(KEYS.member(role, "ghost-nowhere"))


def test_a_cluster_without_a_lane_says_so_refuses_soon_and_is_back_by_itself(own):
    own.until(lambda: ready(own, 200) and available(own)[0] == "True", 20, "all well at first")
    (node,) = own.nodes("attention")
    group = family(node.pid)
    for pid in group:
        os.kill(pid, signal.SIGSTOP)
    try:
        own.until(lambda: ready(own, 503), 30, "the router is not ready")
        own.until(lambda: available(own)[0] == "False", 15, "not Available")
        began_s = time.monotonic()
        status, said = get(own, "/v1/completions", BODY)
        assert status == 503 and time.monotonic() - began_s < 8, (status, said)
        assert "weight-1" in json.loads(said)["error"]["message"], said
    finally:
        for pid in group:
            os.kill(pid, signal.SIGCONT)
    own.flumectl("wait", "--for=condition=Available", "--timeout", "30s")
    own.until(lambda: ready(own, 200), 15, "the router is ready again")
    status, said = get(own, "/v1/completions", BODY)
    assert status == 200, said
    assert {"Unavailable", "Available"} <= set(own.flumectl("events").stdout.split())


def family(pid: int) -> list[int]:
    """A process and its children; an engine is one of its node's, or forked for it by the zygote."""
    found = [pid]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            if parent in found:
                found.append(int(entry.name))
    return found
