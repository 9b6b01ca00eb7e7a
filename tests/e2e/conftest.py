"""Real clusters, started and stopped by the commands a user types."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from flume_protos.v1 import attention_pb2, attention_pb2_grpc
from flume_protos.v1 import router_pb2_grpc as router_rpc

FLUMECTL = [sys.executable, "-m", "flume_controller.flumectl"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """One cluster on this machine, with its own data directory and ports."""

    data_dir: Path
    http_port: int
    admin_port: int
    etcd_port: int

    def flumectl(
        self, *words: str, timeout_s: float = 120, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*FLUMECTL, *words],
            env={**os.environ, "FLUME_SERVER": f"127.0.0.1:{self.admin_port}"},
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(
                f"flumectl {' '.join(words)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
            )
        return done

    def up(self, *words: str) -> None:
        self.flumectl(
            "up", "--detach", "--data-dir", str(self.data_dir), "--http-port", str(self.http_port),
            "--admin-port", str(self.admin_port), "--etcd-port", str(self.etcd_port), *words,
        )  # fmt: skip

    def down(self) -> None:
        self.flumectl("down", "--data-dir", str(self.data_dir), check=False)

    def get(self, what: str) -> list[dict]:
        return json.loads(self.flumectl("get", what, "-o", "json").stdout)

    def scale(self, replicas: int, *words: str) -> None:
        self.flumectl("scale", "attention", "--replicas", str(replicas), *words)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def pid(self, role: str, node: str | None = None) -> int:
        return next(n["pid"] for n in self.get("nodes") if n["role"] == role and node in (None, n["id"]))

    def pid_in_use(self, role: str) -> int:
        """A process of this role that the first live sequence goes through, where that can be told."""
        used = {route["weight_node"] for route in self.get("routes")}
        used |= {item["node"] for route in self.get("routes") for item in route["ranges"]}
        nodes = [node for node in self.get("nodes") if node["role"] == role]
        return next((node["pid"] for node in nodes if node["id"] in used), nodes[0]["pid"])

    def settled(self) -> bool:
        """Whether every role has its nodes, all READY, and as many attention nodes as desired."""
        done = self.flumectl("status", "-o", "json", check=False)
        if done.returncode or any(node["state"] != "READY" for node in self.get("nodes")):
            return False
        attention = json.loads(done.stdout)["attention"]
        return attention["desired"] == attention["ready"] == len(self.attention())

    def router(self) -> router_rpc.RouterStub:
        node = next(n for n in self.get("nodes") if n["role"] == "router")
        return router_rpc.RouterStub(grpc.insecure_channel(node["address"]))

    def attention(self) -> dict[str, dict]:
        return {n["id"]: n for n in self.get("nodes") if n["role"] == "attention"}

    def held_blocks(self) -> int:
        """KV blocks that ranges use, asked of the attention nodes themselves."""
        return sum(stats.used_blocks for stats in self.stats())

    def stats(self) -> list[attention_pb2.StatsReply]:
        replies = []
        for node in self.attention().values():
            with grpc.insecure_channel(node["address"]) as channel:
                stub = attention_pb2_grpc.AttentionStub(channel)
                replies.append(stub.Stats(attention_pb2.StatsRequest(), timeout=5))
        return replies

    def until(self, predicate, timeout_s: float, what: str):
        """Poll; the value once it is true. Fails with `what` when time is up."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if value := predicate():
                return value
            time.sleep(0.05)
        raise AssertionError(
            f"not within {timeout_s} s: {what}\n{self.flumectl('get', 'nodes', check=False).stdout}"
        )


@contextmanager
def running(folder: Path, *words: str) -> Iterator[Cluster]:
    cluster = Cluster(folder, free_port(), free_port(), free_port())
    try:
        cluster.up(*words)
        yield cluster
    finally:
        cluster.down()
        left = [line for line in _processes() if str(folder) in line]
        for line in left:
            os.kill(int(line.split()[0]), signal.SIGKILL)
        assert not left, left


def _processes() -> list[str]:
    lines = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line.strip() for line in lines.splitlines()[1:]]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """SmolLM2 in float32, for all tests here; each scales it to what it needs."""
    with running(tmp_path_factory.mktemp("cluster"), "--dtype", "float32", "--attention", "1") as cluster:
        yield cluster
