"""`flumectl autoscale`: let the controller choose the number of attention nodes, or stop that."""

from __future__ import annotations

import click
from flume_protos.v1 import admin_pb2

from flume_controller.flumectl.client import CALL_DEADLINE_S, Target, admin, who
from flume_controller.flumectl.options import MAX_COUNT, dry_run_option, target_options

COUNT = click.IntRange(1, MAX_COUNT)


@click.group()
def autoscale() -> None:
    """Let the number of attention nodes follow the load."""


@autoscale.command()
@click.option("--min", "least", type=COUNT, help="Never fewer nodes.  [default: as it was, 1 at first]")
@click.option("--max", "most", type=COUNT, help="Never more nodes.  [default: as it was]")
@click.option(
    "--tpot-slo-ms", type=click.FloatRange(min=0),
    help="Time per output token to keep; 0 looks at memory alone. Sets controller/tpot_slo_ms.",
)  # fmt: skip
@dry_run_option
@target_options
def attention(
    target: Target, least: int | None, most: int | None, tpot_slo_ms: float | None, dry_run: bool
) -> None:
    """Turn it on, within bounds. A later `flumectl scale` pins the number: run this again to go on.

    \b
    Examples:
      flumectl autoscale attention --min 1 --max 4
      flumectl autoscale attention --max 8 --tpot-slo-ms 80
    """
    request = admin_pb2.SetAutoscaleRequest(
        enabled=True, min=least, max=most, tpot_slo_ms=tpot_slo_ms, actor=who(), dry_run=dry_run
    )
    with admin(target) as stub:
        after = stub.SetAutoscale(request, timeout=CALL_DEADLINE_S).after
    suffix = " (dry run)" if dry_run else ""
    click.echo(f"attention autoscaled between {after.min} and {after.max} nodes{suffix}")


@autoscale.command()
@dry_run_option
@target_options
def off(target: Target, dry_run: bool) -> None:
    """Turn it off. The number of nodes stays what it is.

    \b
    Examples:
      flumectl autoscale off
    """
    with admin(target) as stub:
        stub.SetAutoscale(
            admin_pb2.SetAutoscaleRequest(enabled=False, actor=who(), dry_run=dry_run),
            timeout=CALL_DEADLINE_S,
        )
    click.echo("attention no longer autoscaled" + (" (dry run)" if dry_run else ""))
