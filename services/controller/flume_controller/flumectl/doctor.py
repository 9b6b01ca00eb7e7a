"""`flumectl doctor`: what this machine has for nodes, and what stands in their way."""

from __future__ import annotations

from dataclasses import asdict
from importlib import metadata

import click
from flume_common.gpu import limits, mps, nvml, round_trip
from flume_common.gpu.findings import Facts, Finding, Status, findings, obstacles
from flume_common.gpu.visible import NoGpu, visible_gpu

from flume_controller.flumectl.errors import CommandError
from flume_controller.flumectl.options import output_option
from flume_controller.flumectl.output import Column, column, render

COLUMNS = (
    column("CHECK", "check"),
    column("STATUS", "status"),
    column("FOUND", "found"),
    Column("REMEDY", lambda row: str(row["remedy"])),
)
NOT_LOOKED_AT = "not looked at"


@click.command()
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="What nodes shall run on; with cuda, whatever keeps them off the GPUs is a failure.",
)  # fmt: skip
@output_option
def doctor(device: str, fmt: str) -> None:
    """Look at this machine: GPUs, driver, MPS, UCX, memory limits, and a hop between two processes.

    The round trips are measured, there and back, in a few seconds. Exit code 1 if a check failed.

    \b
    Examples:
      flumectl doctor
      flumectl doctor --device cuda
      flumectl doctor -o json | jq '.[] | select(.status != "ok")'
    """
    found = findings(look(), for_gpus=device == "cuda")
    click.echo(render([asdict(finding) for finding in found], COLUMNS, fmt))
    if failed(found):
        raise SystemExit(1)


def look(*, at_ucx: bool = True) -> Facts:
    """This machine."""
    try:
        driver: nvml.Driver | str = nvml.look()
    except nvml.NvmlUnavailable as error:
        driver = str(error)
    ucx: round_trip.Ucx | str = NOT_LOOKED_AT
    if at_ucx:
        try:
            ucx = round_trip.look()
        except round_trip.UcxUnavailable as error:
            ucx = str(error)
    direct: tuple[round_trip.RoundTrip, ...] | str = ()
    if at_ucx and not isinstance(driver, str) and driver.gpus:
        try:
            direct = tuple(round_trip.look_direct())
        except round_trip.Unmeasured as error:
            direct = str(error)
    return Facts(driver, mps.look(), limits.look(), ucx, _torch(), direct)


def _torch() -> str:
    """Its version, without importing it."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def failed(found: list[Finding]) -> bool:
    return any(finding.status is Status.FAILED for finding in found)


def require_gpu(*, allow_time_slicing: bool) -> nvml.Gpu:
    """The one that nodes will share. Raises CommandError with everything that keeps them off it."""
    against = obstacles(look(at_ucx=False), allow_time_slicing=allow_time_slicing)
    if against:
        raise CommandError("\n  ".join(["a cluster cannot run on GPUs here:", *against]))
    try:
        return visible_gpu()
    except NoGpu as error:
        raise CommandError(str(error)) from error
