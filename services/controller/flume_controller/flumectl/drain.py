"""`flumectl drain` and `undrain`: let one node go, as kubectl does."""

from __future__ import annotations

import time
from typing import Any

import click
from flume_protos.v1 import admin_pb2

from flume_controller.flumectl.client import CALL_DEADLINE_S, Target, admin
from flume_controller.flumectl.complete import node_names
from flume_controller.flumectl.duration import DURATION
from flume_controller.flumectl.errors import CommandError
from flume_controller.flumectl.options import deadline_option, dry_run_option, target_options

POLL_S = 0.3


@click.command()
@click.argument("node", shell_complete=node_names("attention"))
@click.option(
    "--timeout",
    "timeout_s",
    type=DURATION,
    default="10m",
    show_default=True,
    help="How long to wait until it is gone; 0 does not wait. It goes on draining after a timeout.",
)
@deadline_option("It is gone by then")
@dry_run_option
@target_options
def drain(target: Target, node: str, timeout_s: float, deadline_s: float, dry_run: bool) -> None:
    """Empty the attention node NODE and let it go. Another one takes its place.

    It takes no new tails, stays until the sequences it holds end, and is gone then. With --deadline the
    others take over what it holds. Streams go on. The last drain of a node counts.

    \b
    Examples:
      flumectl drain attention-2
      flumectl drain attention-2 --deadline 30s
      flumectl drain attention-2 --timeout 0
    """
    request = admin_pb2.DrainNodeRequest(node=node, dry_run=dry_run, deadline_s=deadline_s)
    with admin(target) as stub:
        reply = stub.DrainNode(request, timeout=CALL_DEADLINE_S)
        if dry_run:
            click.echo(f"{node} would be drained (dry run)" if reply.changed else f"{node} drains already")
            return
        click.echo(f"{node} drains" if reply.changed else f"{node} drains already", err=timeout_s > 0)
        if timeout_s > 0:
            _wait_gone(stub, node, timeout_s)
            click.echo(f"{node} drained")


def _wait_gone(stub: Any, node: str, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    last = ""
    while (found := _find(stub, node)) is not None:
        line = f"{node} is {found.state} and holds {found.kv_used_tokens} tokens"
        if line != last:
            click.echo(line, err=True)
            last = line
        if time.monotonic() >= deadline_s:
            raise CommandError(f"timed out after {timeout_s:g} s: {line}; it goes on draining")
        time.sleep(POLL_S)


def _find(stub: Any, node: str) -> admin_pb2.Node | None:
    reply = stub.ListNodes(admin_pb2.ListNodesRequest(), timeout=CALL_DEADLINE_S)
    return next((item for item in reply.nodes if item.id == node), None)


@click.command()
@click.argument("node", shell_complete=node_names("attention"))
@dry_run_option
@target_options
def undrain(target: Target, node: str, dry_run: bool) -> None:
    """Take a `drain` of NODE back while it is there. Whichever node is one too many then goes.

    \b
    Examples:
      flumectl undrain attention-2
    """
    request = admin_pb2.DrainNodeRequest(node=node, dry_run=dry_run)
    with admin(target) as stub:
        stub.UndrainNode(request, timeout=CALL_DEADLINE_S)
        gone = _find(stub, node) is None
    if dry_run:
        click.echo(f"{node} would no longer be drained (dry run)")
    elif gone:
        click.echo(f"{node} is gone already; its name may be used again")
    else:
        click.echo(f"{node} is no longer drained")
