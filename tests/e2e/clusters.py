"""Real clusters, started and stopped by the commands a user types; looked at by the admin API."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
from flume_protos.v1 import admin_pb2, admin_pb2_grpc, attention_pb2, attention_pb2_grpc, common_pb2
from flume_protos.v1 import router_pb2_grpc as router_rpc

FLUMECTL = [sys.executable, "-m", "flume_controller.flumectl"]
ADMIN_S = 30.0
"""A controller that died is back by then."""
RECONNECT = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]


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

    # -- commands --------------------------------------------------------------------------------

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

    def get(self, what: str) -> list[dict[str, Any]]:
        """As an operator's script reads it."""
        return json.loads(self.flumectl("get", what, "-o", "json").stdout)

    def scale(self, replicas: int, *words: str) -> None:
        self.flumectl("scale", "attention", "--replicas", str(replicas), *words)

    # -- what is ---------------------------------------------------------------------------------

    @cached_property
    def admin(self) -> admin_pb2_grpc.AdminStub:
        return admin_pb2_grpc.AdminStub(grpc.insecure_channel(f"127.0.0.1:{self.admin_port}", RECONNECT))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def status(self) -> admin_pb2.StatusReply:
        return next(iter(self.admin.Status(admin_pb2.StatusRequest(), timeout=ADMIN_S, wait_for_ready=True)))

    def nodes(self, role: str = "") -> list[admin_pb2.Node]:
        """Of this role; all without one."""
        request = admin_pb2.ListNodesRequest()
        nodes = self.admin.ListNodes(request, timeout=ADMIN_S, wait_for_ready=True).nodes
        return [node for node in nodes if role in ("", node.role)]

    def routes(self) -> list[common_pb2.Route]:
        request = admin_pb2.ListRoutesRequest()
        return list(self.admin.ListRoutes(request, timeout=ADMIN_S, wait_for_ready=True).routes)

    def requests(self) -> list[admin_pb2.Request]:
        request = admin_pb2.ListRequestsRequest()
        return list(self.admin.ListRequests(request, timeout=ADMIN_S, wait_for_ready=True).requests)

    def in_use(self, role: str) -> list[admin_pb2.Node]:
        """The nodes of this role that live sequences go through, where that can be told; else all."""
        used = {item.node for route in self.routes() for item in route.ranges}
        used |= {route.weight_node for route in self.routes()}
        nodes = self.nodes(role)
        return [node for node in nodes if node.id in used] or nodes

    def settled(self) -> bool:
        """Whether all nodes are READY, and as many attention nodes as desired."""
        if any(node.state != "READY" for node in self.nodes()):
            return False
        status = self.status()
        return status.desired == status.ready == len(self.nodes("attention"))

    def router(self) -> router_rpc.RouterStub:
        (node,) = self.nodes("router")
        return router_rpc.RouterStub(grpc.insecure_channel(node.address))

    def stats(self, *ids: str) -> list[attention_pb2.StatsReply]:
        """Of these attention nodes, from themselves; without ids of all."""
        replies = []
        for node in self.nodes("attention"):
            if ids and node.id not in ids:
                continue
            with grpc.insecure_channel(node.address) as channel:
                stub = attention_pb2_grpc.AttentionStub(channel)
                replies.append(stub.Stats(attention_pb2.StatsRequest(), timeout=5))
        return replies

    def held_blocks(self) -> int:
        """KV blocks that ranges use."""
        return sum(stats.used_blocks for stats in self.stats())

    def until(self, predicate: Callable[[], Any], timeout_s: float, what: str) -> Any:
        """Poll; the value once it is true. Fails with `what` when time is up."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if value := predicate():
                return value
            time.sleep(0.05)
        nodes = self.flumectl("get", "nodes", check=False).stdout
        raise AssertionError(f"not within {timeout_s} s: {what}\n{nodes}")


@contextmanager
def running(folder: Path, *words: str) -> Iterator[Cluster]:
    """`flumectl up` with these words; `down` at the end, which must leave no process."""
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
