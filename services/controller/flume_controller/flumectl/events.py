"""`flumectl events`: what happened in the last hour."""

from __future__ import annotations

import click
from flume_protos.v1 import admin_pb2

from flume_controller.flumectl.client import CALL_DEADLINE_S, Target, admin
from flume_controller.flumectl.options import output_option, target_options
from flume_controller.flumectl.output import Table, render, render_one
from flume_controller.flumectl.rows import EVENT_COLUMNS, event_row


@click.command()
@click.option("--for", "object", default="", metavar="OBJECT", help="Only about this: a node, or KIND/NAME.")
@click.option("--types", default="", metavar="TYPE", help="Only these: Normal, Warning or Normal,Warning.")
@output_option
@click.option("-w", "--watch", is_flag=True, help="Go on and print every event that is new or counts again.")
@target_options
def events(target: Target, object: str, types: str, fmt: str, watch: bool) -> None:
    """List events, oldest first. Alike ones are one event that counts.

    \b
    Examples:
      flumectl events
      flumectl events --for attention-2 --types Warning
      flumectl events -w -o json
    """
    wanted = _types(types)
    request = admin_pb2.ListEventsRequest(object=object)
    with admin(target) as stub:
        if watch:
            table = Table(EVENT_COLUMNS, wide=fmt == "wide")
            for event in stub.WatchEvents(request):
                if event.type in wanted:
                    click.echo(render_one(event_row(event), EVENT_COLUMNS, fmt, table))
            return
        reply = stub.ListEvents(request, timeout=CALL_DEADLINE_S)
    rows = [event_row(event) for event in reply.events if event.type in wanted]
    if rows or fmt in ("json", "yaml"):
        click.echo(render(rows, EVENT_COLUMNS, fmt))
    else:
        click.echo("No events found.", err=True)


def _types(text: str) -> set[str]:
    known = {"Normal", "Warning"}
    wanted = {part.strip() for part in text.split(",") if part.strip()} or known
    if not wanted <= known:
        raise click.BadParameter(f"must be of Normal and Warning, got {text!r}", param_hint="--types")
    return wanted
