"""`python -m flume_attention`: an attention node."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import structlog
from flume_common.config_schema import Scope
from flume_common.config_watch import follow_log_level
from flume_common.incarnation import Incarnation, follow_incarnation
from flume_common.keys import Keys
from flume_common.membership import Member, Registration, Role, State, register
from flume_common.metrics_page import MetricsPage, metrics_page
from flume_common.serving import CannotListen, Server, serve, until_signalled
from flume_common.standby import until_called
from flume_common.store import Store, connect
from flume_common.tasks import background
from flume_common.telemetry import configure_logging, version
from flume_common.wire import PROTOCOL_VERSION
from flume_common.zygote import ENGINE_ZYGOTE
from flume_protos.v1 import attention_pb2_grpc as rpc
from setproctitle import getproctitle, setproctitle

from flume_attention.claims import Claims
from flume_attention.config import Config, engine_args, parse
from flume_attention.errors import ConfigRefused
from flume_attention.memory import kv_bytes, measure, measure_gpu
from flume_attention.metrics import families
from flume_attention.servicer import AttentionServicer
from flume_attention.startup import elapsed_ms
from flume_attention.supervisor import Supervisor

SERVICE = "flume.v1.Attention"
log = structlog.get_logger()


def main() -> int:
    try:
        config = parse()
        configure_logging("attention", config.node, config.log_level)
        import_ms = elapsed_ms()
        budget_bytes = kv_bytes(config.kv_memory, measure_gpu() if config.device == "cuda" else measure())
        measure_ms = elapsed_ms() - import_ms
        log.info("imported", elapsed_ms=elapsed_ms(), measure_ms=measure_ms, kv_bytes=budget_bytes)
        asyncio.run(run(config, budget_bytes))
    except (ConfigRefused, CannotListen, ValueError) as refused:
        print(f"Error: {refused}", file=sys.stderr)
        return 1
    return 0


async def run(config: Config, budget_bytes: int) -> None:
    """Serve until SIGTERM or SIGINT. Raises CannotListen, and ValueError for names that cannot be."""
    keys = Keys(config.cluster)
    keys.member(Role.ATTENTION, config.node)
    supervisor = Supervisor(
        engine_args(config, budget_bytes),
        zygote=os.environ.get(ENGINE_ZYGOTE),
        silence_s=config.engine_silence_s,
    )
    registered: list[Registration] = []
    servicer = AttentionServicer(
        config.node, budget_bytes, supervisor, lambda: registered[0].epoch if registered else 0
    )
    async with (
        # First, as it takes longest; last to stop, so that ranges are served until we are out of the list.
        _engine_of(supervisor),
        connect(config.store) as store,
        metrics_page(
            config.metrics_listen, lambda: store.connected, advertise_host=config.advertise_host
        ) as page,
        serve(config.listen, lambda server: _add(server, servicer), [SERVICE]) as server,
        _joining(config, supervisor) as config,
        _following(store, keys, servicer) as incarnation,
        register(
            store,
            keys,
            _member(config, server, page),
            ttl_s=config.lease_ttl_s,
            incarnation=incarnation,
        ) as registration,
        background(
            publish=supervisor.publish(registration, server),
            log_level=follow_log_level(store, keys, Scope.ATTENTION, config.log_level),
        ),
    ):
        servicer.node = config.node
        page.incarnations = lambda: incarnation.changes
        registered.append(registration)
        page.show(lambda: families(supervisor, servicer.claims), lambda: _checks(supervisor))
        log.info("registered", elapsed_ms=elapsed_ms(), address=server.address, epoch=registration.epoch)
        await until_signalled()
        log.info("stopping", used_tokens=supervisor.report.used_tokens)
        server.set_ready(False)


@asynccontextmanager
async def _engine_of(supervisor: Supervisor) -> AsyncIterator[None]:
    async with background(engine=supervisor.keep_engine()):
        # It is asked for now. What comes next keeps this thread busy for long before it awaits anything.
        await asyncio.sleep(0)
        yield


@asynccontextmanager
async def _following(store: Store, keys: Keys, servicer: AttentionServicer) -> AsyncIterator[Incarnation]:
    """The cluster's incarnation, before others know of us: without it no weight node could attach."""
    async with follow_incarnation(store, keys) as incarnation:
        servicer.claims = Claims(store, keys, incarnation)
        yield incarnation


@asynccontextmanager
async def _joining(config: Config, supervisor: Supervisor) -> AsyncIterator[Config]:
    """Where we are a standby: wait here, all started, until we are told which node to be."""
    if not config.standby:
        yield config
        return
    async with background(tell_ready=_tell_ready(supervisor)):
        node = await until_called(config.standby, os.getpid())
    configure_logging("attention", node, config.log_level)
    log.info("called", standby=config.node)
    setproctitle(f"{getproctitle()} (now {node})")
    yield replace(config, node=node)


async def _tell_ready(supervisor: Supervisor) -> None:
    await supervisor.wait_up()
    log.info("standby_ready", elapsed_ms=elapsed_ms())


def _add(server: grpc.aio.Server, servicer: AttentionServicer) -> None:
    rpc.add_AttentionServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]


def _checks(supervisor: Supervisor) -> dict[str, bool]:
    return {"engine": supervisor.engine_pid is not None, "not-draining": not supervisor.draining}


def _member(config: Config, server: Server, page: MetricsPage) -> Member:
    host = config.advertise_host
    return Member(
        id=config.node,
        role=Role.ATTENTION,
        state=State.PREPARING,
        address=f"{host}:{server.port}" if host else server.address,
        host=socket.gethostname(),
        pid=os.getpid(),
        version=version(),
        protocol_version=PROTOCOL_VERSION,
        started_at_s=time.time(),
        metrics_address=page.address,
    )


if __name__ == "__main__":
    sys.exit(main())
