"""`flumectl rollout status`: whether the last change of the count has come through."""

from __future__ import annotations

import click
from flume_protos.v1 import admin_pb2

from flume_controller.flumectl.client import Target, admin
from flume_controller.flumectl.duration import DURATION
from flume_controller.flumectl.errors import CommandError
from flume_controller.flumectl.options import target_options
from flume_controller.flumectl.watching import given_up, progress, statuses


@click.group()
def rollout() -> None:
    """Follow a change of the number of nodes."""


@rollout.command()
@click.option(
    "--timeout", "timeout_s", type=DURATION, default="0", help="How long to wait.  [default: 0, no limit]"
)
@click.option("--watch/--no-watch", default=True, show_default=True, help="Wait until it is done.")
@target_options
def status(target: Target, timeout_s: float, watch: bool) -> None:
    """Wait until as many attention nodes are ready as are wanted and the others are gone.

    Ends with 1 when the controller gave up on it, or when the time is over.

    \b
    Examples:
      flumectl rollout status
      flumectl rollout status --timeout 5m
      flumectl rollout status --no-watch
    """
    last = ""
    with admin(target) as stub:
        for reply in statuses(stub, timeout_s or None):
            if reason := given_up(reply):
                raise CommandError(f"the change exceeded its progress deadline: {reason}")
            if is_rolled_out(reply):
                click.echo(f"attention rolled out: {progress(reply)}")
                return
            if (line := f"waiting: {progress(reply)}") != last:
                click.echo(line)
                last = line
            if not watch:
                return
    raise CommandError(f"timed out after {timeout_s:g} s: {last.removeprefix('waiting: ')}")


def is_rolled_out(status: admin_pb2.StatusReply) -> bool:
    """Whether the controller has acted on the newest wish and nothing is under way any more. Pure."""
    acted = status.observed_generation >= status.generation
    return acted and status.ready == status.desired and not status.preparing and not status.draining
