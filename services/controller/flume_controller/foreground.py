"""A local cluster in this process, until a signal or Ctrl-C. `python -m` runs it for `up --detach`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
from flume_common.etcd_binary import EtcdError
from flume_common.model_source import ModelSourceError
from flume_common.telemetry import configure_logging

from flume_controller.cluster_files import ClusterRecord
from flume_controller.local_cluster import ClusterConfig, ClusterError, local_cluster
from flume_controller.supervise import ChildFailed, kill_all

REFUSALS = (ClusterError, ChildFailed, ModelSourceError, EtcdError)
"""Everything that keeps a cluster from coming up and that says by itself what to do."""


def encode(config: ClusterConfig) -> str:
    return msgspec.json.encode(config, enc_hook=str).decode()


def decode(text: str) -> ClusterConfig:
    return msgspec.json.decode(text, type=ClusterConfig, dec_hook=lambda _, value: Path(value))


async def run(config: ClusterConfig) -> None:
    """Raises REFUSALS."""
    configure_logging("up", config.name, "warning")
    running = asyncio.current_task()
    assert running is not None
    stopping = _stop_on_signals(running, config)
    try:
        async with local_cluster(config, click.echo) as record:
            click.echo(_hints(record))
            await asyncio.get_running_loop().create_future()
    except asyncio.CancelledError:
        if not stopping.is_set():
            raise
        click.echo("stopped")


def _stop_on_signals(running: asyncio.Task[Any], config: ClusterConfig) -> asyncio.Event:
    """The first signal stops in order, a second one at once."""
    stopping = asyncio.Event()

    def on_signal(number: int) -> None:
        if stopping.is_set():
            kill_all(config.files.records)
            config.files.forget()
            os._exit(128 + number)
        stopping.set()
        click.echo("stopping (once more: at once)", err=True)
        running.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return stopping


def _hints(record: ClusterRecord) -> str:
    name = "" if record.name == "default" else f" --name {record.name}"
    return f"""
OpenAI API   {record.http_url}/v1
Admin API    {record.admin_address}

  curl {record.http_url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{record.model_name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
  flumectl generate{name} "Why is the sky blue?"
  flumectl scale attention{name} --replicas 3
  flumectl get nodes{name}

`flumectl down{name}` stops it, in the foreground Ctrl-C does, too."""


def main(argument: str) -> None:
    try:
        asyncio.run(run(decode(argument)))
    except REFUSALS as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main(sys.argv[1])
