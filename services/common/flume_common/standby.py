"""A node that waits, fully started, until it is told who it is.

It listens on an abstract Unix socket (`flume_common.zygote.abstract_name`) for one line of JSON, the call,
and answers with one: `{"node": "attention-3"}` -> `{"pid": 4711}`. Only our own user is heard.
"""

from __future__ import annotations

import asyncio
import socket

import msgspec

from flume_common.keys import check_name
from flume_common.zygote.protocol import is_ours

CALL_S = 1.0


class StandbyGone(Exception):
    """It does not answer."""


class Call(msgspec.Struct, frozen=True):
    node: str


class Coming(msgspec.Struct, frozen=True):
    pid: int


async def until_called(name: str, pid: int) -> str:
    """Wait for the first proper call; the node's id. Raises OSError when the name is taken."""
    called: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            node = await _read_call(reader, writer.get_extra_info("socket"))
            if node is not None and not called.done():
                called.set_result(node)
                writer.write(msgspec.json.encode(Coming(pid)) + b"\n")
                await writer.drain()
        except ConnectionError:
            pass  # it gave up on us
        finally:
            writer.close()

    server = await asyncio.start_unix_server(answer, f"\0{name}")
    async with server:
        return await called


async def _read_call(reader: asyncio.StreamReader, connection: socket.socket) -> str | None:
    if not is_ours(connection):
        return None
    try:
        return check_name("node", msgspec.json.decode(await reader.readline(), type=Call).node)
    except ValueError:
        return None


async def call(name: str, node: str, *, timeout_s: float = CALL_S) -> int:
    """Tell the standby that listens there to become `node`; its pid. Raises StandbyGone."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(f"\0{name}")
            try:
                if not is_ours(writer.get_extra_info("socket")):
                    raise StandbyGone(f"{name} belongs to another user")
                writer.write(msgspec.json.encode(Call(node)) + b"\n")
                return msgspec.json.decode(await reader.readline(), type=Coming).pid
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError) as error:
        raise StandbyGone(str(error) or f"no answer within {timeout_s:g} s") from error
