"""An etcd at one address whose data is lost, restored from a snapshot or another cluster's: real ones."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from flume_common.etcd_binary import EmbeddedEtcd, embedded_etcd, find_etcd, free_port


class ReplaceableEtcd:
    """Made by `replaceable_etcd`. While it is stopped, its address refuses connections."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._client_port, self._peer_port = free_port(), free_port()
        self._number = 0
        self._running = AsyncExitStack()
        self.etcd: EmbeddedEtcd

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._client_port}"

    @property
    def _data(self) -> Path:
        return self._folder / f"etcd-{self._number}"

    async def start(self) -> None:
        """On the data that is there."""
        self.etcd = await self._running.enter_async_context(
            embedded_etcd(
                self._data,
                client_port=self._client_port,
                peer_port=self._peer_port,
                args=["--unsafe-no-fsync"],
                stop_s=0,
            )
        )

    async def kill(self) -> None:
        await self._running.aclose()

    async def save(self, path: Path) -> None:
        await _etcdctl("--endpoints", self.endpoint, "snapshot", "save", str(path))

    async def wipe(self, away_s: float = 0.0) -> None:
        """Kill it, and start one without data: cluster id, member id and raft term are the same ones."""
        await self.kill()
        self._number += 1
        await asyncio.sleep(away_s)
        await self.start()

    async def restore(self, path: Path, *, token: str = "etcd-cluster", away_s: float = 0.0) -> None:
        """Kill it, and start one from a snapshot; with another token its cluster id is another one, too."""
        await self.kill()
        self._number += 1
        peer = f"http://127.0.0.1:{self._peer_port}"
        self._data.mkdir()
        await _etcdctl(
            "snapshot", "restore", str(path), "--data-dir", str(self._data / "data"), "--name", "default",
            "--initial-cluster", f"default={peer}", "--initial-advertise-peer-urls", peer,
            "--initial-cluster-token", token,
        )  # fmt: skip
        await asyncio.sleep(away_s)
        await self.start()


@asynccontextmanager
async def replaceable_etcd(folder: Path) -> AsyncIterator[ReplaceableEtcd]:
    etcd = ReplaceableEtcd(folder)
    await etcd.start()
    try:
        yield etcd
    finally:
        await etcd.kill()
        shutil.rmtree(folder, ignore_errors=True)


async def _etcdctl(*args: str) -> None:
    done = await asyncio.to_thread(
        subprocess.run,
        [str(find_etcd().parent / "etcdctl"), *args],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
