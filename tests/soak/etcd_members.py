"""Three etcds on this machine, as processes that may be killed and started again with their data."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from clusters import free_port
from flume_common.etcd_binary import find_etcd
from flume_protos.etcd import etcd_pb2 as pb
from flume_protos.etcd import etcd_pb2_grpc as rpc

START_S = 30.0
CALL_S = 2.0


@dataclass(frozen=True)
class Lease:
    id: int
    granted_s: int
    keys: tuple[str, ...]  # that hang on it


class Member:
    def __init__(
        self, name: str, folder: Path, client_port: int, peers: dict[str, int], also: Sequence[str] = ()
    ) -> None:
        """`also`: addresses of ours at which other hosts reach it."""
        self.name = name
        self.port = client_port
        self.endpoint = f"127.0.0.1:{client_port}"
        client, peer = f"http://{self.endpoint}", f"http://127.0.0.1:{peers[name]}"
        everybody = ",".join(f"{other}=http://127.0.0.1:{port}" for other, port in peers.items())
        listen = ",".join([client, *(f"http://{address}:{client_port}" for address in also)])
        self._log = folder / f"{name}.log"
        self._command = [
            *(str(find_etcd()), "--name", name, "--data-dir", str(folder / name)),
            *("--listen-client-urls", listen, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            # A crashed process loses nothing that the page cache has; only the machine's crash would.
            *("--initial-cluster", everybody, "--unsafe-no-fsync", "--log-level", "warn"),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self) -> None:
        """SIGKILL; nothing when it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def status(self) -> pb.StatusResponse | None:
        """None when it does not answer, or knows no leader."""
        try:
            with grpc.insecure_channel(self.endpoint) as channel:
                status: pb.StatusResponse = rpc.MaintenanceStub(channel).Status(
                    pb.StatusRequest(), timeout=CALL_S, wait_for_ready=True
                )
        except grpc.RpcError:
            return None
        return status if status.leader else None


class Etcds:
    def __init__(self, members: list[Member]) -> None:
        self.members = members

    @property
    def endpoints(self) -> str:
        return self.endpoints_at("127.0.0.1")

    def endpoints_at(self, address: str) -> str:
        """As those see them who reach us at this address."""
        return ",".join(f"{address}:{member.port}" for member in self.members)

    def leader(self) -> Member:
        """Waits for one. Raises AssertionError when there is none for too long."""
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            for member in self.members:
                status = member.status() if member.pid else None
                if status is not None and status.leader == status.header.member_id:
                    return member
            time.sleep(0.1)
        raise AssertionError(f"no etcd leader within {START_S:g} s")

    def kill(self) -> None:
        for member in self.members:
            member.kill()

    def start(self) -> None:
        """Those that do not run; returns when they have a leader."""
        for member in self.members:
            if member.pid is None:
                member.start()
        self.leader()

    # -- what it holds ---------------------------------------------------------------------------

    def items(self, prefix: str) -> dict[str, pb.KeyValue]:
        """By key. Raises grpc.RpcError."""
        with grpc.insecure_channel(self.leader().endpoint) as channel:
            end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
            request = pb.RangeRequest(key=prefix.encode(), range_end=end.encode())
            found = rpc.KVStub(channel).Range(request, timeout=CALL_S)
        return {kv.key.decode(): kv for kv in found.kvs}

    def leases(self) -> list[Lease]:
        """Every one that lives. Raises grpc.RpcError."""
        with grpc.insecure_channel(self.leader().endpoint) as channel:
            stub = rpc.LeaseStub(channel)
            ids = [lease.id for lease in stub.LeaseLeases(pb.LeaseLeasesRequest(), timeout=CALL_S).leases]
            asked = [
                stub.LeaseTimeToLive(pb.LeaseTimeToLiveRequest(id=id, keys=True), timeout=CALL_S)
                for id in ids
            ]
        return [
            Lease(reply.id, reply.granted_ttl, tuple(key.decode() for key in reply.keys))
            for reply in asked
            if reply.ttl >= 0
        ]


@contextmanager
def three_etcds(folder: Path, also: Sequence[str] = ()) -> Iterator[Etcds]:
    """`also`: addresses of ours at which other hosts reach them, too."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"etcd-{number}" for number in range(1, 4)]
    peers = {name: free_port() for name in names}
    etcds = Etcds([Member(name, folder, free_port(), peers, also) for name in names])
    with ExitStack() as stack:
        stack.callback(etcds.kill)
        etcds.start()
        yield etcds
