"""`flumectl config`: settings that every service follows while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import yaml
from flume_protos.v1 import admin_pb2

from flume_controller.flumectl.client import CALL_DEADLINE_S, Target, admin, who
from flume_controller.flumectl.complete import setting_names
from flume_controller.flumectl.options import dry_run_option, output_option, target_options
from flume_controller.flumectl.output import render
from flume_controller.flumectl.rows import (
    CHANGE_COLUMNS,
    RECORD_COLUMNS,
    SETTING_COLUMNS,
    change_row,
    record_row,
    setting_row,
)

_file_option = click.option(
    "-f", "--filename", "file", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="YAML with NAME: VALUE lines; null unsets.",
)  # fmt: skip


@click.group()
def config() -> None:
    """Show and change settings. Changes take effect at once, without a restart.

    A setting is named SCOPE/KEY, or KEY where it is set by default: `weight/step_timeout_s`.
    """


@config.command()
@click.argument("setting", metavar="[NAME]", required=False, default="", shell_complete=setting_names)
@output_option
@target_options
def get(target: Target, setting: str, fmt: str) -> None:
    """List settings: all, those of a scope, or the one called NAME.

    A value written past flumectl that can't be is marked: services keep the last good one.

    \b
    Examples:
      flumectl config get
      flumectl config get weight -o wide
      flumectl config get step_timeout_s -o json
    """
    with admin(target) as stub:
        reply = stub.GetConfig(admin_pb2.GetConfigRequest(name=setting), timeout=CALL_DEADLINE_S)
    click.echo(render([setting_row(item) for item in reply.settings], SETTING_COLUMNS, fmt))
    for item in reply.settings:
        if item.error:
            click.echo(f"Warning: {item.error}; services keep the last good value", err=True)


@config.command(name="set")
@click.argument("assignments", metavar="NAME=VALUE…", nargs=-1, shell_complete=setting_names)
@_file_option
@dry_run_option
@target_options
def set_(target: Target, assignments: tuple[str, ...], file: Path | None, dry_run: bool) -> None:
    """Set settings, all of them or, when one is refused, none.

    \b
    Examples:
      flumectl config set log_level=debug
      flumectl config set weight/log_level=debug step_timeout_s=5
      flumectl config set min_replicas=2 max_replicas=8 --dry-run
      flumectl config set -f settings.yaml
    """
    _change(target, _assignments(assignments, file), dry_run)


@config.command()
@click.argument("names", metavar="NAME…", nargs=-1, required=True, shell_complete=setting_names)
@dry_run_option
@target_options
def unset(target: Target, names: tuple[str, ...], dry_run: bool) -> None:
    """Take settings back: what the services were started with holds again.

    Also removes what `config get` shows as unknown, SCOPE/KEY as it stands there.

    \b
    Examples:
      flumectl config unset weight/log_level
      flumectl config unset weight/step_timeout
    """
    _change(target, [admin_pb2.Assignment(name=name) for name in names], dry_run)


@config.command()
@click.argument("assignments", metavar="[NAME=VALUE…]", nargs=-1, shell_complete=setting_names)
@_file_option
@output_option
@target_options
def diff(target: Target, assignments: tuple[str, ...], file: Path | None, fmt: str) -> None:
    """Show what `config set` would change; without arguments what differs from the defaults.

    Ends with 1 when there is a difference.

    \b
    Examples:
      flumectl config diff
      flumectl config diff step_timeout_s=5
      flumectl config diff -f settings.yaml
    """
    wanted = _assignments(assignments, file) if assignments or file else []
    with admin(target) as stub:
        reply = stub.DiffConfig(admin_pb2.DiffConfigRequest(assignments=wanted), timeout=CALL_DEADLINE_S)
    if reply.changes or fmt in ("json", "yaml"):
        click.echo(render([change_row(item) for item in reply.changes], CHANGE_COLUMNS, fmt))
    if reply.changes:
        raise SystemExit(1)


@config.command()
@click.argument("setting", metavar="NAME", shell_complete=setting_names)
@output_option
@target_options
def history(target: Target, setting: str, fmt: str) -> None:
    """List the last changes of a setting, oldest first: what, when, and who.

    \b
    Examples:
      flumectl config history step_timeout_s
    """
    with admin(target) as stub:
        reply = stub.ConfigHistory(admin_pb2.ConfigHistoryRequest(name=setting), timeout=CALL_DEADLINE_S)
    if reply.records or fmt in ("json", "yaml"):
        click.echo(render([record_row(item) for item in reply.records], RECORD_COLUMNS, fmt))
    else:
        click.echo(f"{reply.name} was never set.", err=True)


def _change(target: Target, assignments: Iterable[admin_pb2.Assignment], dry_run: bool) -> None:
    request = admin_pb2.SetConfigRequest(assignments=assignments, actor=who(), dry_run=dry_run)
    with admin(target) as stub:
        reply = stub.SetConfig(request, timeout=CALL_DEADLINE_S)
    for item in reply.changes:
        row = change_row(item)
        before, after = ("<not set>" if row[key] is None else row[key] for key in ("before", "after"))
        click.echo(f"{row['name']}: {before} -> {after}" + (" (dry run)" if dry_run else ""))
    if not reply.changes:
        click.echo("nothing to change")


def _assignments(words: Iterable[str], file: Path | None) -> list[admin_pb2.Assignment]:
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise click.UsageError(f"expected NAME=VALUE, got {word!r}")
        found.append(admin_pb2.Assignment(name=name, value=value))
    if file is not None:
        found += [_assignment(name, value) for name, value in _mapping(file).items()]
    if not found:
        raise click.UsageError("give NAME=VALUE or --filename")
    return found


def _mapping(file: Path) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{file} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise click.UsageError(f"{file} must hold NAME: VALUE lines")
    return content


def _assignment(name: object, value: object) -> admin_pb2.Assignment:
    return admin_pb2.Assignment(name=str(name), value=None if value is None else str(value))
