"""`flumectl logs`: what the processes of a local cluster print."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import click

from flume_controller import log_rotation
from flume_controller.cluster_files import ClusterFiles
from flume_controller.flumectl.errors import CommandError
from flume_controller.flumectl.options import data_dir_option, name_option
from flume_controller.logfiles import LineReader

FOLLOW_POLL_S = 0.2


def _complete_node(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    files = ClusterFiles(ctx.params["data_dir"], ctx.params["name"])
    return [path.stem for path in _files(files.logs) if path.stem.startswith(incomplete)]


@click.command()
@click.argument("node", required=False, shell_complete=_complete_node)
@click.option("-f", "--follow", is_flag=True, help="Go on and print what comes.")
@click.option(
    "-p", "--previous", is_flag=True, help="Of the log before this one, of an earlier `up` perhaps."
)
@click.option("--tail", type=click.IntRange(min=0), help="Only the last N lines of each.", metavar="N")
@name_option
@data_dir_option
def logs(node: str | None, follow: bool, previous: bool, tail: int | None, name: str, data_dir: Path) -> None:
    """Print the log of NODE, or of every process of the local cluster with its name before each line.

    \b
    Examples:
      flumectl logs weight-1 --tail 20
      flumectl logs -f
      flumectl logs weight-1 --previous
    """
    directory = ClusterFiles(data_dir, name).logs
    files = [path for path in _files(directory) if node in (None, path.stem)]
    if not files:
        names = ", ".join(path.stem for path in _files(directory)) or "none"
        what = f"log of {node!r}" if node else "logs"
        raise CommandError(f"no {what} in {directory}; there are: {names}")
    if previous:
        _print_previous(files, node, tail)
        return
    for line in _lines(directory, node, tail, follow):
        click.echo(line)


def _print_previous(files: list[Path], node: str | None, tail: int | None) -> None:
    """Raises CommandError when there is none."""
    older = [(path, log_rotation.old(path, 1)) for path in files if log_rotation.old(path, 1).exists()]
    if not older:
        raise CommandError(f"no earlier log of {node or 'any process'} in {files[0].parent}")
    for path, old in older:
        prefix = "" if node else f"[{path.stem}] "
        for line in _last(LineReader(old).lines(), tail):
            click.echo(prefix + line)


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.log"))


def _lines(directory: Path, node: str | None, tail: int | None, follow: bool) -> Iterator[str]:
    readers: dict[Path, LineReader] = {}
    while True:
        for path in _files(directory):
            if node in (None, path.stem):
                fresh = readers.setdefault(path, LineReader(path)).lines()
                prefix = "" if node else f"[{path.stem}] "
                yield from (prefix + line for line in _last(fresh, tail))
        if not follow:
            return
        tail = None  # what comes from now on is new as a whole
        time.sleep(FOLLOW_POLL_S)


def _last(lines: list[str], count: int | None) -> list[str]:
    return lines if count is None else lines[len(lines) - min(count, len(lines)) :]
