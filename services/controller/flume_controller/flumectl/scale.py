"""`flumectl scale`: set the desired number of attention nodes and see it through."""

from __future__ import annotations

from typing import Any

import click
from flume_protos.v1 import admin_pb2

from flume_controller.flumectl.client import CALL_DEADLINE_S, Target, admin
from flume_controller.flumectl.duration import DURATION
from flume_controller.flumectl.errors import CommandError
from flume_controller.flumectl.options import MAX_COUNT, deadline_option, dry_run_option, target_options
from flume_controller.flumectl.watching import given_up, progress, statuses

REPLICAS = click.IntRange(0, MAX_COUNT)


@click.group()
def scale() -> None:
    """Change how many attention nodes there are."""


@scale.command()
@click.option("--replicas", type=REPLICAS, required=True, help="How many there should be.")
@click.option(
    "--current-replicas",
    type=REPLICAS,
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
@deadline_option("Nodes that leave are gone by then")
@click.option("--wait-drained", is_flag=True, help="Wait until the nodes that leave are gone, too.")
@dry_run_option
@target_options
def attention(
    target: Target,
    replicas: int,
    current_replicas: int | None,
    timeout_s: float,
    deadline_s: float,
    wait_drained: bool,
    dry_run: bool,
) -> None:
    """Set the number of attention nodes and wait until that many are ready.

    Streams go on meanwhile. A node that leaves first drains: it stays until the sequences it holds end,
    or with --deadline until the others have taken over what it holds.

    \b
    Examples:
      flumectl scale attention --replicas 3
      flumectl scale attention --replicas 1 --wait-drained --timeout 5m
      flumectl scale attention --replicas 1 --deadline 30s
      flumectl scale attention --replicas 4 --current-replicas 3
    """
    request = admin_pb2.ScaleRequest(replicas=replicas, actor="user", dry_run=dry_run, deadline_s=deadline_s)
    if current_replicas is not None:
        request.current_replicas = current_replicas
    with admin(target) as stub:
        reply = stub.Scale(request, timeout=CALL_DEADLINE_S)
        if timeout_s > 0 and not dry_run:
            _wait(stub, reply, timeout_s, wait_drained)
    click.echo(f"attention scaled ({reply.previous} -> {reply.replicas})" + (" (dry run)" if dry_run else ""))


def _wait(stub: Any, scaled: admin_pb2.ScaleReply, timeout_s: float, wait_drained: bool) -> None:
    last = ""
    latest = None
    for latest in statuses(stub, timeout_s):
        if latest.generation > scaled.generation:
            if reason := given_up(latest):
                raise CommandError(f"the controller gave up: {reason}")
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


def is_done(status: admin_pb2.StatusReply, generation: int, wait_drained: bool) -> bool:
    """Whether the controller has acted on `generation` and reached it. Pure."""
    acted = status.observed_generation >= generation
    return acted and status.ready == status.desired and not (wait_drained and status.draining)
