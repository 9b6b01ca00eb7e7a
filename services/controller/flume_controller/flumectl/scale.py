"""`flumectl scale`: set the desired number of attention nodes and see it through."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import click
import grpc
from flume_protos.v1 import admin_pb2

from flume_controller.flumectl.client import CALL_DEADLINE_S, Target, admin
from flume_controller.flumectl.duration import DURATION
from flume_controller.flumectl.errors import CommandError
from flume_controller.flumectl.options import target_options


@click.group()
def scale() -> None:
    """Change how many attention nodes there are."""


@scale.command()
@click.option("--replicas", type=click.IntRange(min=0), required=True, help="How many there should be.")
@click.option(
    "--current-replicas",
    type=click.IntRange(min=0),
    help="Only if this is the desired number now; otherwise nothing changes.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=DURATION,
    default="60s",
    show_default=True,
    help="How long to wait for it; 0 does not wait. The controller goes on after a timeout.",
)
@click.option("--wait-drained", is_flag=True, help="Wait until the nodes that leave are gone, too.")
@target_options
def attention(
    target: Target, replicas: int, current_replicas: int | None, timeout_s: float, wait_drained: bool
) -> None:
    """Set the number of attention nodes and wait until that many are ready.

    Streams go on meanwhile. A node that leaves first drains: it stays until the sequences it holds end.

    \b
    Examples:
      flumectl scale attention --replicas 3
      flumectl scale attention --replicas 1 --wait-drained --timeout 5m
      flumectl scale attention --replicas 4 --current-replicas 3
    """
    request = admin_pb2.ScaleRequest(replicas=replicas, actor="user")
    if current_replicas is not None:
        request.current_replicas = current_replicas
    with admin(target) as stub:
        reply = stub.Scale(request, timeout=CALL_DEADLINE_S)
        if timeout_s > 0:
            _wait(stub, reply, timeout_s, wait_drained)
    click.echo(f"attention scaled ({reply.previous} -> {reply.replicas})")


def _wait(stub: Any, scaled: admin_pb2.ScaleReply, timeout_s: float, wait_drained: bool) -> None:
    last = ""
    latest = None
    for latest in _statuses(stub, timeout_s):
        if latest.generation > scaled.generation:
            raise CommandError(
                f"superseded: the desired number is {latest.desired} now, set while this command waited"
            )
        if (line := progress(latest)) != last:
            click.echo(line, err=True)
            last = line
        if is_done(latest, scaled.generation, wait_drained):
            return
    state = progress(latest) if latest else "the controller reported nothing"
    raise CommandError(
        f"timed out after {timeout_s:g} s: {state}; the controller goes on, see `flumectl status`"
    )


def _statuses(stub: Any, timeout_s: float) -> Iterator[admin_pb2.StatusReply]:
    """Every status until the timeout."""
    deadline_s = time.monotonic() + timeout_s
    try:
        yield from stub.Status(admin_pb2.StatusRequest(watch=True), timeout=timeout_s)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
    # A watch that ends early must not make this look done, nor like a timeout before its time.
    if time.monotonic() < deadline_s - 0.5:
        raise CommandError("the controller ended the watch; it goes on scaling, see `flumectl status`")


def is_done(status: admin_pb2.StatusReply, generation: int, wait_drained: bool) -> bool:
    """Whether the controller has acted on `generation` and reached it. Pure."""
    acted = status.observed_generation >= generation
    return acted and status.ready == status.desired and not (wait_drained and status.draining)


def progress(status: admin_pb2.StatusReply) -> str:
    """One line for people. Pure."""
    parts = [f"{status.ready} of {status.desired} ready"]
    if status.preparing:
        parts.append(f"{status.preparing} preparing")
    if status.draining:
        parts.append(f"{status.draining} draining")
    trouble = [item for item in status.conditions if item.type == "Degraded" and item.status == "True"]
    return ", ".join(parts) + "".join(f"; {item.reason}: {item.message}" for item in trouble)
