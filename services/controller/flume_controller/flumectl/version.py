"""`flumectl version`: this command's and the controller's."""

from __future__ import annotations

import click
import grpc
from flume_common.telemetry import version as own_version
from flume_protos.v1 import admin_pb2, admin_pb2_grpc

from flume_controller.flumectl.client import Target
from flume_controller.flumectl.errors import CommandError
from flume_controller.flumectl.options import output_option, target_options
from flume_controller.flumectl.output import Table, render_one

DEADLINE_S = 2.0


@click.command()
@click.option("--client", is_flag=True, help="Only this command's; asks no controller.")
@output_option
@target_options
def version(target: Target, client: bool, fmt: str) -> None:
    """Print the versions of flumectl and, where one is reachable, of the controller.

    \b
    Examples:
      flumectl version
      flumectl version --client -o json
    """
    row = (
        {"client": own_version()} if client else {"client": own_version(), "controller": _controller(target)}
    )
    if fmt in ("json", "yaml"):
        click.echo(render_one(row, (), fmt, Table((), wide=False)).removeprefix("---\n"))
        return
    for name, value in row.items():
        click.echo(f"{name}: {value or 'not reachable'}")


def _controller(target: Target) -> str | None:
    try:
        with grpc.insecure_channel(target.address) as channel:
            reply = admin_pb2_grpc.AdminStub(channel).ListNodes(  # type: ignore[no-untyped-call]
                admin_pb2.ListNodesRequest(), timeout=DEADLINE_S
            )
    except (CommandError, grpc.RpcError):
        return None
    return next((node.version for node in reply.nodes if node.role == "controller"), None)
