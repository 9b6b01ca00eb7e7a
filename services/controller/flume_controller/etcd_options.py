"""The flags of `flume_common.etcd_flags` for command lines made with click."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from flume_common.etcd_flags import SECURITY, Flag

Command = TypeVar("Command", bound=Callable[..., Any])


def etcd_option(flag: Flag, *, required: bool = False) -> Callable[[Command], Command]:
    text = f"{flag.help[0].upper()}{flag.help[1:]}."
    return click.option(
        flag.name,
        default=None if required else "",
        required=required,
        envvar=flag.variable,
        show_envvar=True,
        metavar=flag.metavar,
        help=text,
    )


def etcd_security_options(command: Command) -> Command:
    """--etcd-ca, --etcd-cert, --etcd-key and --etcd-user."""
    for flag in reversed(SECURITY):
        command = etcd_option(flag)(command)
    return command
