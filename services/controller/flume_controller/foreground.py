"""A local cluster in this process, until a signal or Ctrl-C. `python -m` runs it for `up --detach`."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
from contextlib import suppress
from typing import Any

import click
from flume_common.etcd_binary import EtcdError
from flume_common.model_source import ModelSourceError
from flume_common.telemetry import configure_logging

from flume_controller.cluster_config import ClusterConfig, UnreadableConfig, decode, encode
from flume_controller.cluster_files import DATA_DIR_VARIABLE, NAME_VARIABLE, ClusterRecord
from flume_controller.local_cluster import ClusterError, local_cluster
from flume_controller.supervise import ChildFailed, kill_all

__all__ = ["REFUSALS", "decode", "encode", "main", "run"]

REFUSALS = (ClusterError, ChildFailed, ModelSourceError, EtcdError, UnreadableConfig)
"""Everything that keeps a cluster from coming up and that says by itself what to do."""


async def run(config: ClusterConfig) -> None:
    """Raises REFUSALS."""
    configure_logging("up", config.name, "warning")
    running = asyncio.current_task()
    assert running is not None
    stopping = _stop_on_signals(running, config)
    try:
        async with local_cluster(config, _say) as record:
            _say(_hints(record, config))
            await asyncio.get_running_loop().create_future()
    except asyncio.CancelledError:
        if not stopping.is_set():
            raise
        _say("stopped")


def _stop_on_signals(running: asyncio.Task[Any], config: ClusterConfig) -> asyncio.Event:
    """The first signal stops in order, a second one at once."""
    stopping = asyncio.Event()

    def on_signal(number: int) -> None:
        if stopping.is_set():
            kill_all(config.files.records)
            config.files.forget()
            os._exit(128 + number)
        stopping.set()
        running.cancel()
        _say("stopping (once more: at once)", err=True)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return stopping


def _say(line: str, *, err: bool = False) -> None:
    with suppress(OSError):  # a file on a disk that is full, a terminal that is gone
        click.echo(line, err=err)


def _hints(record: ClusterRecord, config: ClusterConfig) -> str:
    flags = config.files.flags
    other = f"\n\n{_context(config)}" if flags else ""
    return f"""
OpenAI API   {record.http_url}/v1
Admin API    {record.admin_address}

  curl {record.http_url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{record.model_name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
  flumectl generate{flags} "Why is the sky blue?"
  flumectl scale attention{flags} --replicas 3
  flumectl get nodes{flags}{other}

`flumectl down{flags}` stops it, in the foreground Ctrl-C does, too."""


def _context(config: ClusterConfig) -> str:
    """What saves typing these flags each time."""
    directory = shlex.quote(str(config.files.data_dir.absolute()))
    variables = f"{NAME_VARIABLE}={config.name} {DATA_DIR_VARIABLE}={directory}"
    return f"`export {variables}` makes it the one that flumectl means."


def main(argument: str) -> None:
    os.umask(0o077)
    try:
        asyncio.run(run(decode(argument)))
    except REFUSALS as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main(sys.argv[1])
