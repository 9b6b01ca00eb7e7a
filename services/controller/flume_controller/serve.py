"""Wire the controller together. Read the `async with` downwards for start-up, upwards for shutdown."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

from flume_common.autoscale import Settings
from flume_common.config_schema import Scope, Values
from flume_common.config_watch import watch_config
from flume_common.election import Candidate
from flume_common.incarnation import follow_incarnation
from flume_common.keys import Keys
from flume_common.membership import Member, Members, Role, State, register, watch_members
from flume_common.metrics_page import Answer, MetricsPage, metrics_page
from flume_common.serving import Server, serve
from flume_common.store import connect
from flume_common.tasks import background
from flume_common.telemetry import level, version
from flume_common.wire import PROTOCOL_VERSION
from flume_protos.v1 import admin_pb2, admin_pb2_grpc

from flume_controller import discovery, event_store
from flume_controller.admin import AdminServicer, Sources
from flume_controller.config import ControllerConfig
from flume_controller.last_known import follow_last_known
from flume_controller.lead import Leader, Surroundings, autoscale_settings
from flume_controller.metrics import families
from flume_controller.nodes import GrpcNodes, node_calls
from flume_controller.views import watch_spec, watch_status

SERVICE = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name


async def run(config: ControllerConfig) -> NoReturn:
    """The controller, until cancelled. Attention nodes go on without it."""
    keys = Keys(config.cluster)
    async with (
        connect(config.store) as store,
        metrics_page(config.metrics_listen, lambda: store.connected) as page,
        follow_incarnation(store, keys) as incarnation,
        watch_members(store, keys) as members,
        watch_spec(store, keys) as wish,
        watch_status(store, keys) as report,
        event_store.watch(store, keys) as events,
        watch_config(store, keys, Scope.CONTROLLER, Values(log_level=level())) as settings,
        follow_last_known(store, keys, incarnation) as last_known,
        node_calls() as nodes,
    ):
        candidate = Candidate(store, keys.election, config.node, config.election)
        around = Surroundings(store, keys, members, wish, report, nodes, last_known)
        leader = Leader(config, around, candidate)
        leader.settings = lambda: with_settings(autoscale_settings(config), settings.current)
        sources = Sources(store, keys, members, wish, report, leader.provider, nodes, events, incarnation)
        async with (
            serve(config.listen, _adder(sources), [SERVICE], ready=True, grace_s=1.0) as server,
            register(
                store, keys, _member(config, server, page), ttl_s=config.lease_ttl_s, incarnation=incarnation
            ),
            # Innermost: it resigns first, so that another one leads while we still answer.
            background(
                campaign=candidate.campaign(leader.lead),
                tidy_channels=_tidy(members, nodes),
            ),
        ):
            page.add(
                discovery.PATH,
                lambda: Answer(
                    200, discovery.targets(members.current.values(), config.cluster), "application/json"
                ),
            )
            page.incarnations = lambda: incarnation.changes
            page.show(
                lambda: families(candidate, leader, wish, report),
                lambda: {"started": True},
                lambda: {"leading": candidate.leading},
            )
            await asyncio.get_running_loop().create_future()
    raise AssertionError("the future above never completes")


def with_settings(settings: Settings, values: Values) -> Settings:
    """What the autoscaler follows: the settings of the cluster where it has them."""
    return replace(
        settings,
        min=values.min_replicas,
        max=values.max_replicas,
        watermark=values.watermark_ratio,
        cooldown_s=values.cooldown_s,
        tpot_slo_s=values.tpot_slo_ms / 1e3,
    )


def _adder(sources: Sources) -> Callable[..., None]:
    servicer = AdminServicer(sources)
    return lambda server: admin_pb2_grpc.add_AdminServicer_to_server(  # type: ignore[no-untyped-call]
        servicer, server
    )


def _member(config: ControllerConfig, server: Server, page: MetricsPage) -> Member:
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
        metrics_address=page.address,
    )


async def _tidy(members: Members, nodes: GrpcNodes) -> NoReturn:
    version = 0
    while True:
        version = await members.wait_newer(version)
        await nodes.keep_only(member.address for member in members.current.values())
