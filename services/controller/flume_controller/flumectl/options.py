"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from flume_controller.cluster_files import (
    DATA_DIR_VARIABLE,
    DEFAULT_DATA_DIR,
    DEFAULT_NAME,
    NAME_VARIABLE,
    ClusterFiles,
)
from flume_controller.flumectl.client import Target
from flume_controller.flumectl.duration import DURATION
from flume_controller.flumectl.output import FORMATS

MAX_COUNT = 2**31 - 1
"""Fits every count of the admin API; what is too many for a cluster is the controller's to say."""


def _validated_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    try:
        ClusterFiles(Path(), value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return value


name_option = click.option(
    "--name",
    default=DEFAULT_NAME,
    show_default=True,
    envvar=NAME_VARIABLE,
    show_envvar=True,
    metavar="CLUSTER",
    callback=_validated_name,
    help="The cluster's name.",
)
data_dir_option = click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_DATA_DIR,
    envvar=DATA_DIR_VARIABLE,
    help="Where local clusters keep logs and state.  "
    f"[env: {DATA_DIR_VARIABLE}; default: ~/.local/share/kernelflume]",
)
server_option = click.option(
    "--server",
    envvar="FLUME_SERVER",
    metavar="HOST:PORT",
    help="The controller's admin API; by default that of the local cluster.  [env: FLUME_SERVER]",
)
output_option = click.option(
    "-o", "--output", "fmt", type=click.Choice(FORMATS), default="table", show_default=True, help="Format."
)

dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Let the controller check it and say what would change; change nothing."
)


def deadline_option(what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """--deadline as `deadline_s`, 0 without one."""
    return click.option(
        "--deadline",
        "deadline_s",
        type=DURATION,
        default=0.0,
        help=f"{what}: the others pull what they hold, and what is left then is computed again.  "
        "[default: none, until their sequences end]",
    )


def target_options(command: Callable[..., None]) -> Callable[..., None]:
    """--server, --name and --data-dir as one `target`. The innermost decorator of a command."""

    @server_option
    @name_option
    @data_dir_option
    @wraps(command)
    def with_target(*, server: str | None, name: str, data_dir: Path, **values: Any) -> None:
        command(target=Target(server, ClusterFiles(data_dir, name)), **values)

    return with_target
