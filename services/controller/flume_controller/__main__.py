"""`python -m flume_controller`: the command line of the controller."""

from __future__ import annotations

import asyncio
import shlex
import sys
from pathlib import Path
from typing import Any

import click
from flume_common.serving import until_signalled
from flume_common.telemetry import LEVELS, configure_logging

from flume_controller.config import ControllerConfig
from flume_controller.serve import run


@click.command()
@click.option("--cluster", default="default", show_default=True, help="Name of the cluster in etcd.")
@click.option("--node", default="controller-1", show_default=True, help="Id of this controller.")
@click.option("--etcd", required=True, metavar="HOST:PORT[,…]", help="etcd endpoints.")
@click.option("--listen", default="127.0.0.1:9400", show_default=True, help="Address of the admin API.")
@click.option("--provider", type=click.Choice(["local"]), default="local", show_default=True)
@click.option(
    "--attention-command",
    default=shlex.join((sys.executable, "-m", "flume_attention")),
    help="What runs an attention node; something like numactl may come before it.",
)
@click.option(
    "--attention-args", default="", help="More options for every attention node, e.g. '--kv-memory 512MiB'."
)
@click.option(
    "--attention", "initial_attention", type=click.IntRange(min=0), default=1, show_default=True,
    help="Desired number of attention nodes where none has been set yet.",
)  # fmt: skip
@click.option(
    "--data-dir", type=click.Path(path_type=Path, file_okay=False), required=True,
    help="For records of the processes it starts and their logs.",
)  # fmt: skip
@click.option("--log-level", type=click.Choice(LEVELS), default="info", show_default=True)
def main(attention_command: str, attention_args: str, log_level: str, **settings: Any) -> None:
    """Keep as many attention nodes running as are wanted, and serve the admin API."""
    config = ControllerConfig(
        attention_command=tuple(shlex.split(attention_command)),
        attention_args=tuple(shlex.split(attention_args)),
        **settings,
    )
    configure_logging("controller", config.node, log_level)
    asyncio.run(_until_signalled(config))


async def _until_signalled(config: ControllerConfig) -> None:
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(run(config), name="controller")
        await until_signalled()
        running.cancel()


if __name__ == "__main__":
    main()
