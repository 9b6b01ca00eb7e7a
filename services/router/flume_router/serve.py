"""Wire the router together. Read the `async with` downwards for start-up, upwards for shutdown."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from typing import NoReturn

import msgspec
import structlog
from flume_common.config_schema import Scope, Values
from flume_common.config_watch import LiveConfig, watch_config
from flume_common.incarnation import follow_incarnation
from flume_common.keys import Keys
from flume_common.listening import reachable_address
from flume_common.membership import Member, Registration, Role, State, register, watch_members
from flume_common.model_source import ModelSource
from flume_common.serving import Server, channel
from flume_common.serving import serve as grpc_server
from flume_common.store import connect
from flume_common.tasks import background
from flume_common.telemetry import version
from flume_protos.v1.router_pb2_grpc import add_RouterServicer_to_server

from flume_router.byte_budget import ByteBudget
from flume_router.config import RouterConfig
from flume_router.generation import Generation
from flume_router.http.app import build_app
from flume_router.http.door import Door
from flume_router.http.limits import HttpLimits, connection_limit, raise_descriptor_limit
from flume_router.http.refusals import Refusals
from flume_router.http.server import http_server
from flume_router.in_flight import InFlight
from flume_router.progress import ResumeLimits
from flume_router.prompts import Prompts
from flume_router.reading.frames import Setup
from flume_router.reading.identity import identity
from flume_router.reading.reader import RequestReader
from flume_router.reading.workers import open_workers
from flume_router.service import Service
from flume_router.servicer import SERVICE, RouterServicer
from flume_router.text_model import TextModel
from flume_router.weight_pool import WeightPool, open_pool

log = structlog.get_logger(__name__)


async def serve(
    config: RouterConfig,
    source: ModelSource,
    text: TextModel,
    bound: socket.socket,
    *,
    serving: asyncio.Event,
    stop: asyncio.Event,
    prestart: bool = False,
) -> None:
    """Until `stop`; sets `serving` when others can reach us. Takes over `bound`, the HTTP socket.

    `prestart`: have a process for large requests ready rather than start it with the first of them.

    Raises CannotListen for the gRPC address, StoreRefused when etcd does not let us in.
    """
    model = config.model_name or source.name
    keys = Keys(config.cluster)
    in_flight = InFlight(config.request_deadline_s, config.max_waiting_requests)
    started_at_s = time.time()
    log.info("router_starting", model=model, etcd=",".join(config.store.endpoints))
    async with (
        connect(config.store) as store,
        watch_members(store, keys) as members,
        watch_config(store, keys, Scope.ROUTER, _base(config)) as settings,
        follow_incarnation(store, keys) as incarnation,
        open_pool(
            members,
            channel,
            model=model,
            vocab_size=text.tokenizer.vocab_size,
            silence_s=config.silence_s,
            standstill_s=config.resume_s,
        ) as pool,
        open_workers(
            _reader_setup(source, model, config.parse_control_tokens),
            size=config.readers,
            time_limit_s=config.reading_timeout_s,
        ) as workers,
    ):
        generation = Generation(pool, text.tokenizer, ResumeLimits(resume_s=config.resume_s))
        reader = RequestReader(Prompts(model, text, config.parse_control_tokens), workers, pool)
        bodies = ByteBudget(config.body_budget_bytes)
        door = Door(http_limits(config, raise_descriptor_limit()), Refusals())
        service = Service(
            model,
            text,
            pool,
            generation,
            in_flight,
            bodies,
            reader,
            door,
            started_at_s,
            lambda: incarnation.changes,
        )
        servicer = RouterServicer(service)
        http_address = reachable_address(config.listen_http, bound, config.advertise_host)
        async with (
            grpc_server(
                config.listen_grpc,
                lambda server: add_RouterServicer_to_server(servicer, server),  # type: ignore[no-untyped-call]
                [SERVICE],
            ) as grpc,
            http_server(build_app(service, cors_origins=config.cors_origins), bound, door),
            # Innermost, so given up first: others stop counting on us before we refuse their calls.
            register(
                store,
                keys,
                Member(
                    id=config.node,
                    role=Role.ROUTER,
                    state=State.READY,
                    address=_advertised(grpc.address, config),
                    host=socket.gethostname(),
                    pid=os.getpid(),
                    version=version(),
                    protocol_version=0,
                    started_at_s=started_at_s,
                    model=model,
                    http_address=http_address,
                    metrics_address=http_address,
                ),
                ttl_s=config.lease_ttl_s,
                incarnation=incarnation,
            ) as registration,
        ):
            async with background(
                readiness=_report_readiness(pool, grpc, registration),
                settings=_follow(settings, in_flight, generation, pool),
                **({"prestart": workers.prestart()} if prestart else {}),
            ):
                log.info(
                    "router_serving", http=registration.member.http_address, grpc=grpc.address, model=model
                )
                serving.set()
                await stop.wait()
            log.info("router_draining", requests=len(in_flight))
            grpc.set_ready(False)
            await registration.update(state=State.DRAINING)
            await in_flight.drain(config.drain_s)
    log.info("router_stopped")


def _reader_setup(source: ModelSource, model: str, parse_control_tokens: bool) -> Setup:
    return Setup(str(source.path), source.kind, source.name, model, identity(source), parse_control_tokens)


def http_limits(config: RouterConfig, descriptors: int) -> HttpLimits:
    """`descriptors`: how many files this process may have open."""
    limit = connection_limit(descriptors, config.max_connections)
    if limit < config.max_connections:
        log.warning("max_connections_lowered", to=limit, open_files_limit=descriptors)
    return HttpLimits(
        body_bytes=config.body_limit_bytes,
        header_timeout_s=config.header_timeout_s,
        body_timeout_s=config.body_timeout_s,
        idle_timeout_s=config.idle_timeout_s,
        write_timeout_s=config.write_timeout_s,
        max_connections=limit,
    )


def _advertised(address: str, config: RouterConfig) -> str:
    return f"{config.advertise_host}:{address.rpartition(':')[2]}" if config.advertise_host else address


def _base(config: RouterConfig) -> Values:
    """What holds where nothing is set: our flags."""
    return Values(
        log_level=config.log_level,  # type: ignore[arg-type] # a choice of the command line
        request_deadline_s=config.request_deadline_s,
        max_waiting_requests=config.max_waiting_requests,
    )


async def _follow(
    settings: LiveConfig, in_flight: InFlight, generation: Generation, pool: WeightPool
) -> NoReturn:
    version = -1
    while True:
        version = await settings.wait_newer(version)
        values = settings.current
        in_flight.deadline_s = values.request_deadline_s
        pool.canary_interval_s = values.canary_interval_s
        in_flight.max_waiting = values.max_waiting_requests
        generation.limits = msgspec.structs.replace(
            generation.limits, unavailable_s=values.unavailable_wait_s
        )


async def _report_readiness(pool: WeightPool, grpc: Server, registration: Registration) -> NoReturn:
    while True:
        grpc.set_ready(pool.ready)
        canary = f"failed: {pool.canary_failure}" if pool.canary_failure else ""
        if canary != registration.member.canary:
            await registration.update(canary=canary)
        await pool.changed()
