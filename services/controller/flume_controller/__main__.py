"""`python -m flume_controller`: the command line of the controller."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from flume_common.election import Timing
from flume_common.etcd_flags import ENDPOINTS, store_config
from flume_common.metrics_page import METRICS_LISTEN
from flume_common.serving import CannotListen, until_signalled
from flume_common.telemetry import LEVELS, configure_logging

from flume_controller.config import ControllerConfig
from flume_controller.etcd_options import etcd_option, etcd_security_options
from flume_controller.flumectl.duration import DURATION
from flume_controller.serve import run


@click.command()
@click.option("--cluster", default="default", show_default=True, help="Name of the cluster in etcd.")
@click.option("--node", default="controller-1", show_default=True, help="Id of this controller.")
@etcd_option(ENDPOINTS, required=True)
@etcd_security_options
@click.option("--listen", default="127.0.0.1:9400", show_default=True, help="Address of the admin API.")
@click.option(
    "--metrics-listen", default=METRICS_LISTEN, show_default=True, metavar="HOST:PORT",
    help="HTTP address of /metrics, /livez and /readyz. Port 0 takes a free one, which "
    "`flumectl get nodes -o wide` shows.",
)  # fmt: skip
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
    "--standby", type=click.IntRange(min=0), default=0, show_default=True,
    help="Attention nodes kept started ahead of need, which scaling out then only has to call.",
)  # fmt: skip
@click.option(
    "--zygote/--no-zygote", default=True, show_default=True,
    help="Fork attention nodes from a process that has all imported, rather than import anew each time.",
)  # fmt: skip
@click.option(
    "--attention", "initial_attention", type=click.IntRange(min=0), default=1, show_default=True,
    help="Desired number of attention nodes where none has been set yet.",
)  # fmt: skip
@click.option(
    "--prefer-ids", default="", metavar="ID[,…]",
    help="Ids that new attention nodes get before any other.",
)  # fmt: skip
@click.option(
    "--data-dir", type=click.Path(path_type=Path, file_okay=False), required=True,
    help="For records of the processes it starts and their logs.",
)  # fmt: skip
@click.option(
    "--leader-elect-lease-duration", "lease_s", type=DURATION, default="15s", show_default=True,
    help="How long other controllers wait for a leader that died without saying so.",
)  # fmt: skip
@click.option(
    "--leader-elect-renew-deadline", "renew_deadline_s", type=DURATION, default="10s", show_default=True,
    help="A leader that could not renew its lease for so long stops leading. Shorter than the lease.",
)  # fmt: skip
@click.option(
    "--leader-elect-retry-period", "retry_s", type=DURATION, default="2s", show_default=True,
    help="Between two renewals. The renew deadline must be more than 1.2 times as long.",
)  # fmt: skip
@click.option(
    "--progress-deadline", "progress_deadline_s", type=DURATION, default="10m", show_default=True,
    help="A scale-up without progress for so long returns to the last good count.",
)  # fmt: skip
@click.option(
    "--autoscale-bandwidth", "attention_bandwidth_bytes_per_s", type=click.FloatRange(min=0), default=0,
    help="Bytes per second at which an attention node reads KV, for the SLO's limit; 0: as measured.",
)  # fmt: skip
@click.option(
    "--autoscale-rest", "rest_of_step_s", type=DURATION, default="0s",
    help="Part of a step that is not reading KV, for the same limit; 0: as measured.",
)  # fmt: skip
@click.option("--log-level", type=click.Choice(LEVELS), default="info", show_default=True)
def main(
    attention_command: str,
    attention_args: str,
    prefer_ids: str,
    lease_s: float,
    renew_deadline_s: float,
    retry_s: float,
    log_level: str,
    **settings: Any,
) -> None:
    """Keep as many attention nodes running as are wanted, and serve the admin API.

    Several may run side by side: one leads, the others serve the admin API and wait.
    """
    etcd = {name: settings.pop(name) for name in list(settings) if name.startswith("etcd")}
    try:
        election, store = Timing(lease_s, renew_deadline_s, retry_s), store_config(etcd)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    config = ControllerConfig(
        attention_command=tuple(shlex.split(attention_command)),
        attention_args=tuple(shlex.split(attention_args)),
        preferred_ids=tuple(filter(None, prefer_ids.split(","))),
        election=election,
        store=store,
        **settings,
    )
    configure_logging("controller", config.node, log_level)
    refused: Sequence[BaseException] = ()
    try:
        asyncio.run(_until_signalled(config))
    except* CannotListen as errors:
        refused = errors.exceptions
    if refused:
        raise click.ClickException(str(refused[0]))


async def _until_signalled(config: ControllerConfig) -> None:
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(run(config), name="controller")
        await until_signalled()
        running.cancel()


if __name__ == "__main__":
    main()
