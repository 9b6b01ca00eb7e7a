"""Wire the controller together. Read the `async with` downwards for start-up, upwards for shutdown."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NoReturn

from flume_common.keys import Keys
from flume_common.membership import Member, Members, Role, State, register, watch_members
from flume_common.serving import Server, serve
from flume_common.store import StoreConfig, connect
from flume_common.tasks import background
from flume_common.telemetry import version
from flume_common.wire import PROTOCOL_VERSION
from flume_protos.v1 import admin_pb2, admin_pb2_grpc

from flume_controller.admin import AdminServicer, Sources
from flume_controller.config import ControllerConfig
from flume_controller.fleet import AttentionFleet
from flume_controller.nodes import GrpcNodes, node_calls
from flume_controller.providers.local import local_provider
from flume_controller.reconcile import Reconciler
from flume_controller.spec import AttentionSpec
from flume_controller.views import watch_spec, watch_status

SERVICE = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name


async def run(config: ControllerConfig) -> NoReturn:
    """The controller, until cancelled. Attention nodes go on without it."""
    keys = Keys(config.cluster)
    async with (
        connect(StoreConfig.parse(config.etcd)) as store,
        watch_members(store, keys) as members,
        watch_spec(store, keys) as wish,
        watch_status(store, keys) as report,
        node_calls() as nodes,
        local_provider(
            lambda node: attention_command(config, node), config.data_dir, grace_s=config.stop_grace_s
        ) as provider,
    ):
        fleet = AttentionFleet(store, keys, provider, nodes, initial_spec(config))
        reconciler = Reconciler(fleet.reconcile, resync_s=config.resync_s)
        sources = Sources(store, keys, members, wish, report, provider, nodes)
        async with (
            serve(config.listen, _adder(sources), [SERVICE], ready=True, grace_s=1.0) as server,
            register(store, keys, _member(config, server), ttl_s=config.lease_ttl_s),
            # Innermost: whoever would elect a leader puts this block, and only this, under its lease.
            background(
                reconcile=reconciler.run(),
                wake_on_members=_forward(members.changed, reconciler.poke),
                wake_on_spec=_forward(wish.changed, reconciler.poke),
                wake_on_process=_forward(provider.changed, reconciler.poke),
                tidy_channels=_tidy(members, nodes),
            ),
        ):
            await asyncio.get_running_loop().create_future()
    raise AssertionError("the future above never completes")


def initial_spec(config: ControllerConfig) -> AttentionSpec:
    return AttentionSpec(desired=config.initial_attention, updated_at_s=time.time())


def attention_command(config: ControllerConfig, node: str) -> Sequence[str]:
    return (
        *config.attention_command,
        *("--cluster", config.cluster, "--node", node, "--etcd", config.etcd, "--listen", "127.0.0.1:0"),
        *config.attention_args,
    )


def _adder(sources: Sources) -> Callable[..., None]:
    servicer = AdminServicer(sources)
    return lambda server: admin_pb2_grpc.add_AdminServicer_to_server(  # type: ignore[no-untyped-call]
        servicer, server
    )


def _member(config: ControllerConfig, server: Server) -> Member:
    return Member(
        id=config.node,
        role=Role.CONTROLLER,
        state=State.READY,
        address=server.address,
        host=socket.gethostname(),
        pid=os.getpid(),
        version=version(),
        protocol_version=PROTOCOL_VERSION,
        started_at_s=time.time(),
    )


async def _forward(changed: Callable[[], Awaitable[None]], poke: Callable[[], None]) -> NoReturn:
    while True:
        await changed()
        poke()


async def _tidy(members: Members, nodes: GrpcNodes) -> NoReturn:
    version = 0
    while True:
        version = await members.wait_newer(version)
        await nodes.keep_only(member.address for member in members.current.values())
