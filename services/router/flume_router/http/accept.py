"""Accepts connections one at a time, and only as many as there is room for.

asyncio's own server goes on accepting, thousands of times a second, when there is no descriptor left.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import NoReturn

import structlog

from flume_router.http.door import Door

log = structlog.get_logger(__name__)

_PAUSE_S = 0.2
_LOG_EVERY_S = 60.0


async def accept(bound: socket.socket, door: Door, make: Callable[[], asyncio.BaseProtocol]) -> NoReturn:
    """Serve each connection to `bound` by a protocol of `make`, for ever."""
    loop = asyncio.get_running_loop()
    bound.setblocking(False)
    logged_at = -_LOG_EVERY_S
    while True:
        await door.until_room()
        try:
            sock, _ = await loop.sock_accept(bound)
            await loop.connect_accepted_socket(make, sock)
        except ConnectionError:
            continue  # it was gone again
        except OSError as error:
            # No descriptor, or no memory for one: what the process needs otherwise comes first.
            door.refusals.count("descriptors")
            door.close_idlest()
            if loop.time() - logged_at > _LOG_EVERY_S:
                logged_at = loop.time()
                log.error("connections_not_accepted", detail=str(error), connections=len(door))
            await asyncio.sleep(_PAUSE_S)
