"""Names from the running cluster, for shell completion. Quiet when there is none: a shell must not hang."""

from __future__ import annotations

from collections.abc import Callable

import click
import grpc
from flume_protos.v1 import admin_pb2, admin_pb2_grpc

from flume_controller.cluster_files import ClusterFiles
from flume_controller.flumectl.client import Target
from flume_controller.flumectl.errors import CommandError

DEADLINE_S = 1.0

Complete = Callable[[click.Context, click.Parameter, str], list[str]]


def node_names(*roles: str) -> Complete:
    """Completes the ids of nodes, of these roles only if any are given."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        nodes = _nodes(ctx)
        return [
            node.id for node in nodes if node.id.startswith(incomplete) and (not roles or node.role in roles)
        ]

    return complete


def setting_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Completes settings by their full names, and by their keys alone."""
    from flume_common.config_schema import SETTINGS, Path

    names = [Path(scope, item.key).name for item in SETTINGS.values() for scope in item.scopes]
    return [name for name in (*SETTINGS, *names) if name.startswith(incomplete)]


def _nodes(ctx: click.Context) -> list[admin_pb2.Node]:
    files = ClusterFiles(ctx.params["data_dir"], ctx.params["name"])
    try:
        with grpc.insecure_channel(Target(ctx.params["server"], files).address) as channel:
            stub = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
            return list(stub.ListNodes(admin_pb2.ListNodesRequest(), timeout=DEADLINE_S).nodes)
    except (CommandError, grpc.RpcError):
        return []
