"""A fake weight node or router: a real process and member, nothing behind it. `$FAKE_STATE` steers it.

`<state>/refuse-<role>`: it says the file's content and exits with 1. A router answers /health.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import time
from pathlib import Path

from flume_common.keys import Keys
from flume_common.membership import Member, Role, State, register
from flume_common.serving import until_signalled
from flume_common.store import StoreConfig, connect
from flume_common.telemetry import configure_logging


async def answer(reader, writer):
    await reader.readline()
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
    await writer.drain()
    writer.close()


async def main(role):
    flags = argparse.ArgumentParser()
    for name in ("cluster", "node", "etcd", "model", "model-name"):
        flags.add_argument(f"--{name}", required=True)
    flags.add_argument("--listen-http", default="127.0.0.1:0")
    flags.add_argument("--listen", "--listen-grpc", required=True)
    args, _ = flags.parse_known_args()
    configure_logging(role, args.node)  # as real ones do, whose logs may be on a disk that is full
    refusal = Path(os.environ.get("FAKE_STATE", "/nonexistent")) / f"refuse-{role}"
    if refusal.exists():
        sys.exit(refusal.read_text())
    host, _, port = args.listen_http.rpartition(":")
    async with (
        await asyncio.start_server(answer, host, int(port)),
        connect(StoreConfig.parse(args.etcd)) as store,
    ):
        member = Member(
            id=args.node, role=role, state=State.READY, host=socket.gethostname(),
            address=f"{args.listen.rpartition(':')[0]}:1", pid=os.getpid(), version="fake",
            protocol_version=1, started_at_s=time.time(), model=args.model_name,
        )  # fmt: skip
        async with register(store, Keys(args.cluster), member, ttl_s=2):
            await until_signalled()


def run(role):
    asyncio.run(main(Role(role)))
