"""`flumectl wait`: until a condition is so."""

from __future__ import annotations

import click
from flume_protos.v1 import admin_pb2

from flume_controller.flumectl.client import Target, admin
from flume_controller.flumectl.duration import DURATION
from flume_controller.flumectl.errors import CommandError
from flume_controller.flumectl.options import target_options
from flume_controller.flumectl.watching import statuses

CONDITIONS = ("Available", "Progressing", "Degraded")
STATUSES = ("True", "False", "Unknown")


def _parse(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, str]:
    kind, _, rest = value.partition("=")
    name, _, status = rest.partition("=")
    by_lower = {known.lower(): known for known in (*CONDITIONS, *STATUSES)}
    condition, wanted = by_lower.get(name.lower()), by_lower.get((status or "True").lower())
    if kind != "condition" or condition not in CONDITIONS or wanted not in STATUSES:
        raise click.BadParameter(
            f"must be condition=NAME or condition=NAME=STATUS with NAME of {', '.join(CONDITIONS)} "
            f"and STATUS of {', '.join(STATUSES)}, got {value!r}"
        )
    return condition, wanted


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return [name for item in CONDITIONS if (name := f"condition={item}").startswith(incomplete)]


@click.command()
@click.option(
    "--for", "wanted", required=True, metavar="condition=NAME[=STATUS]", callback=_parse,
    shell_complete=_complete, help="Available, Progressing or Degraded; STATUS is True unless given.",
)  # fmt: skip
@click.option("--timeout", "timeout_s", type=DURATION, default="30s", show_default=True, help="0 looks once.")
@target_options
def wait(target: Target, wanted: tuple[str, str], timeout_s: float) -> None:
    """Wait until a condition of the attention nodes is so, for the count that is wanted now.

    \b
    Examples:
      flumectl wait --for=condition=Available
      flumectl wait --for=condition=Progressing=False --timeout 5m
    """
    name, status = wanted
    found = "the controller reported nothing"
    with admin(target) as stub:
        for reply in statuses(stub, timeout_s or 1.0):
            found = said(reply, name)
            if is_met(reply, name, status):
                click.echo(f"attention: condition {name} is {status}")
                return
            if timeout_s == 0:
                break
    raise CommandError(f"timed out waiting for {name}={status}: {found}")


def is_met(reply: admin_pb2.StatusReply, name: str, status: str) -> bool:
    """A condition about an earlier wish says nothing. Pure."""
    acted = reply.observed_generation >= reply.generation
    return acted and any(item.type == name and item.status == status for item in reply.conditions)


def said(reply: admin_pb2.StatusReply, name: str) -> str:
    """What the condition says now. Pure."""
    for item in reply.conditions:
        if item.type == name:
            return f"it is {item.status} ({item.reason}: {item.message})"
    return "it is not known"
