"""A gate between a client and a server, to break connections in the ways networks do."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress

import pytest


class Gate:
    """Forwards TCP to `target`. `shut` drops everyone, `mute` swallows what the server says, `stall` all."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._port = 0
        self._flow = {"up": asyncio.Event(), "down": asyncio.Event()}
        self.muted = False

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    async def open(self) -> None:
        for flow in self._flow.values():
            flow.set()
        self.muted = False
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
            self._port = self._server.sockets[0].getsockname()[1]

    async def shut(self) -> None:
        """Close every connection and refuse new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def stall(self) -> None:
        """Connections stay, bytes don't move: a stopped process, a black hole."""
        for flow in self._flow.values():
            flow.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(*self._target)
        self._writers |= {writer, up_writer}
        for source, sink, way in ((reader, up_writer, "up"), (up_reader, writer, "down")):
            task = asyncio.create_task(self._pump(source, sink, way))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: str) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65536):
                await self._flow[way].wait()
                if not (self.muted and way == "down"):
                    sink.write(data)
                    await sink.drain()
        sink.close()


@pytest.fixture
def gate():
    @asynccontextmanager
    async def opened(target: str):
        made = Gate(target)
        await made.open()
        try:
            yield made
        finally:
            await made.shut()

    return opened
