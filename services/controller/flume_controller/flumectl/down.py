"""`flumectl down`: stop the cluster of this machine, also what is left of a crashed one."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import suppress
from pathlib import Path

import click

from flume_controller import processes
from flume_controller.cluster_files import ClusterFiles, ClusterRecord
from flume_controller.flumectl.duration import DURATION
from flume_controller.flumectl.errors import CommandError
from flume_controller.flumectl.options import data_dir_option, name_option
from flume_controller.supervise import sweep


@click.command()
@click.option(
    "--timeout",
    "timeout_s",
    type=DURATION,
    default="30s",
    show_default=True,
    help="After this, what still runs is killed.",
)
@click.option(
    "--purge", is_flag=True,
    help="Then forget it, too: number of nodes, settings, events, flags of `up`, logs.",
)  # fmt: skip
@click.option("-y", "--yes", is_flag=True, help="Do not ask before --purge.")
@click.option("--dry-run", is_flag=True, help="Say what would be stopped; stop nothing.")
@name_option
@data_dir_option
def down(timeout_s: float, purge: bool, yes: bool, dry_run: bool, name: str, data_dir: Path) -> None:
    """Stop everything that `flumectl up` started, in order. Does nothing where nothing runs.

    What the cluster knows is kept, and the next `up` brings it back as it was.

    \b
    Examples:
      flumectl down
      flumectl down --purge --yes
      flumectl down --name two
      flumectl down --dry-run
    """
    files = ClusterFiles(data_dir, name)
    if dry_run:
        click.echo(_would_stop(files, purge=purge))
        return
    if purge and not yes:
        _confirm(files)
    record = files.read()
    was_running = record is not None and record.running
    if record is not None and was_running:
        asyncio.run(_ask(record, timeout_s))
    files.remember_nodes()
    left = asyncio.run(sweep(files.records, grace_s=min(timeout_s, 10.0)))
    files.forget()
    if purge:
        given = (files.read_config() or {}).get("etcd", "")
        files.purge()
    click.echo(_said(name, was_running, left) + (_forgotten(files, given) if purge else ""))


def _confirm(files: ClusterFiles) -> None:
    """Raises CommandError, or Abort for a no."""
    if not sys.stdin.isatty():
        raise CommandError("--purge forgets the cluster for good: confirm it with --yes")
    click.confirm(f"Forget all of cluster {files.name!r}, {files.directory}?", abort=True)


def _forgotten(files: ClusterFiles, given_etcd: str) -> str:
    kept = f"; what the etcd at {given_etcd} knows of it is left there" if given_etcd else ""
    return f", and {files.directory} removed{kept}"


async def _ask(record: ClusterRecord, timeout_s: float) -> None:
    """Let the `up` that runs it stop it."""
    processes.send(record.supervisor, signal.SIGTERM)
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await processes.wait_ended(record.supervisor)
            return
    processes.send(record.supervisor, signal.SIGKILL)
    await processes.wait_ended(record.supervisor)


def _would_stop(files: ClusterFiles, *, purge: bool) -> str:
    """What runs now, the `up` itself and the processes it looks after, and what would be removed."""
    gone = f", and {files.directory} removed" if purge else ""
    record = files.read()
    running = [item.id for item in files.records.all() if processes.is_alive(item)]
    if record is not None and record.running:
        running.insert(0, f"flumectl up (pid {record.supervisor.pid})")
    if not running:
        return f"cluster {files.name!r} is not running{gone} (dry run)"
    return f"cluster {files.name!r} would be stopped: {', '.join(running)}{gone} (dry run)"


def _said(name: str, was_running: bool, left: list[str]) -> str:
    if left:
        return f"cluster {name!r} stopped, with what had been left behind: {', '.join(left)}"
    return f"cluster {name!r} stopped" if was_running else f"cluster {name!r} is not running"
