"""A fake attention node: a real process, member and gRPC server, and no KV.

What it holds is read from `<state>/<node>.held` (tokens, 0 without the file); with `<state>/crash` there
it exits at once. Started like the real one.
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
from flume_common.serving import serve, until_signalled
from flume_common.store import StoreConfig, connect
from flume_common.telemetry import configure_logging
from flume_protos.v1 import attention_pb2 as pb
from flume_protos.v1 import attention_pb2_grpc as rpc
from flume_protos.v1 import common_pb2


class FakeAttention(rpc.AttentionServicer):
    def __init__(self, node, state):
        self.node = node
        self.held_file = state / f"{node}.held"
        self.draining = False
        self.registration = None

    @property
    def held(self):
        return int(self.held_file.read_text()) if self.held_file.exists() else 0

    async def Stats(self, request, context):
        return pb.StatsReply(
            node=self.node,
            state=common_pb2.DRAINING if self.draining else common_pb2.READY,
            capacity_tokens=1000,
            used_tokens=self.held,
            lanes=[pb.LaneStats(weight_node="weight-1", sequences=1)] if self.held else [],
            safe_to_delete=self.draining and self.held == 0,
        )

    async def Drain(self, request, context):
        self.draining = True
        leave_by_s = time.time() + request.deadline_s if request.deadline_s else 0.0
        await self.registration.update(state=State.DRAINING, leave_by_s=leave_by_s)
        return pb.DrainReply()

    async def Undrain(self, request, context):
        self.draining = False
        await self.registration.update(state=State.READY, leave_by_s=0.0)
        return pb.UndrainReply()


async def main(args):
    configure_logging("attention", args.node)
    servicer = FakeAttention(args.node, args.state)
    async with (
        connect(StoreConfig.parse(args.etcd)) as store,
        serve(
            args.listen, lambda s: rpc.add_AttentionServicer_to_server(servicer, s), [], ready=True
        ) as server,
    ):
        member = Member(
            id=args.node, role=Role.ATTENTION, state=State.READY, address=server.address,
            host=socket.gethostname(), pid=os.getpid(), version="fake", protocol_version=1,
            started_at_s=time.time(), kv_capacity_tokens=1000, metrics_address=server.address,
        )  # fmt: skip
        async with register(store, Keys(args.cluster), member, ttl_s=2) as servicer.registration:
            print(f"fake {args.node} is ready", flush=True)
            await until_signalled()


if __name__ == "__main__":
    flags = argparse.ArgumentParser()
    for name in ("cluster", "node", "etcd", "listen"):
        flags.add_argument(f"--{name}", required=True)
    flags.add_argument("--state", type=Path, default=Path(os.environ.get("FAKE_STATE", "/nonexistent")))
    parsed, _ = flags.parse_known_args()
    if (parsed.state / "crash").exists():
        sys.exit("fake: told to crash")
    asyncio.run(main(parsed))
