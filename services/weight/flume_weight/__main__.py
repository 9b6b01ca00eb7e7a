"""`python -m flume_weight`: a weight node."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import time
from typing import NoReturn

import grpc
import structlog
from flume_common.config_schema import Scope
from flume_common.config_watch import watch_config
from flume_common.etcd_flags import store_config
from flume_common.incarnation import follow_incarnation
from flume_common.keys import Keys
from flume_common.membership import Member, Role, State, digest_of, new_secret, register, watch_members
from flume_common.metrics_page import MetricsPage, metrics_page
from flume_common.model_source import ModelSource, ModelSourceError, resolve_model
from flume_common.readiness import Check
from flume_common.reasons import Reason, text_of
from flume_common.route_store import RouteWriter
from flume_common.serving import CannotListen, Server, serve, until_signalled
from flume_common.store import connect
from flume_common.tasks import background
from flume_common.telemetry import configure_logging, version
from flume_common.wire import PROTOCOL_VERSION
from flume_protos.v1 import weight_pb2_grpc as rpc

from flume_weight import settings
from flume_weight.config import check, supervisor_flags
from flume_weight.errors import ConfigRefused
from flume_weight.metrics import families
from flume_weight.servicer import WeightServicer
from flume_weight.supervisor import Supervisor

SERVICE = "flume.v1.Weight"
log = structlog.get_logger()


def main() -> int:
    args = supervisor_flags().parse_args()
    configure_logging("weight", args.node, args.log_level)
    try:
        check(args)
        asyncio.run(run(args, resolve_model(args.model)))
    except (ConfigRefused, ModelSourceError, CannotListen, ValueError) as refused:
        print(f"Error: {refused}", file=sys.stderr)
        return 1
    return 0


async def run(args: argparse.Namespace, source: ModelSource) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigRefused when the engine cannot start, CannotListen."""
    keys = Keys(args.cluster)
    async with (
        connect(store_config(vars(args))) as store,
        metrics_page(
            args.metrics_listen, lambda: store.connected, advertise_host=args.advertise_host
        ) as page,
        watch_members(store, keys) as members,
        watch_config(store, keys, Scope.WEIGHT, settings.base(args)) as config,
        follow_incarnation(store, keys) as incarnation,
    ):
        secret = new_secret()
        supervisor = Supervisor(args, source, members, config, secret)
        page.incarnations = lambda: incarnation.changes
        async with (
            serve(args.listen, lambda server: _add(server, supervisor), [SERVICE]) as server,
            register(
                store,
                keys,
                _member(args, supervisor, server, page, secret),
                ttl_s=args.lease_ttl_s,
                incarnation=incarnation,
            ) as registration,
            RouteWriter(store, keys, registration) as routes,
            supervisor.detaching(registration),
            background(engine=supervisor.run(registration, routes), readiness=_report(supervisor, server)),
        ):
            page.show(lambda: families(supervisor, routes), lambda: _checks(supervisor))
            await until_signalled()
            log.info("stopping", live_requests=len(supervisor.streams))
            server.set_ready(False)


async def _report(supervisor: Supervisor, server: Server) -> NoReturn:
    """Health follows what our member says."""
    while True:
        server.set_ready(supervisor.serving.state is State.READY)
        await asyncio.sleep(0.2)


def _checks(supervisor: Supervisor) -> dict[str, Check]:
    """What `/readyz` depends on, and why it fails."""
    serving = supervisor.serving
    engine = supervisor.ready is not None
    return {
        "engine": engine or text_of(Reason.LOADING),
        "lane": engine and (serving.state is State.READY or text_of(serving.reason)),
    }


def _add(server: grpc.aio.Server, supervisor: Supervisor) -> None:
    rpc.add_WeightServicer_to_server(WeightServicer(supervisor), server)  # type: ignore[no-untyped-call]


def _member(
    args: argparse.Namespace, supervisor: Supervisor, server: Server, page: MetricsPage, secret: bytes
) -> Member:
    host = args.advertise_host
    return Member(
        id=args.node,
        role=Role.WEIGHT,
        state=State.PREPARING,
        reason=Reason.LOADING,
        address=f"{host}:{server.port}" if host else server.address,
        host=socket.gethostname(),
        pid=os.getpid(),
        version=version(),
        protocol_version=PROTOCOL_VERSION,
        started_at_s=time.time(),
        model=supervisor.model_name,
        metrics_address=page.address,
        secret_digest=digest_of(secret),
    )


if __name__ == "__main__":
    sys.exit(main())
