"""`flumectl up`: a cluster on this machine, in the foreground or detached."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from typing import Any

import click
import msgspec
from flume_common.direct_region import HOP_HELP, HOPS
from flume_common.gpu.nvml import Gpu
from flume_common.model_source import ModelSource

from flume_controller import foreground
from flume_controller.cluster_files import ClusterState
from flume_controller.etcd_options import etcd_security_options
from flume_controller.flumectl.doctor import require_gpu
from flume_controller.flumectl.duration import DURATION
from flume_controller.flumectl.errors import CommandError
from flume_controller.flumectl.options import data_dir_option, name_option
from flume_controller.gpu_budget import TooLittleMemory, kv_bytes, model_bytes
from flume_controller.local_cluster import DEFAULT_MODEL, ClusterConfig, check
from flume_controller.logfiles import LineReader

FOLLOW_POLL_S = 0.1
PORT = click.IntRange(1, 65535)


@click.command()
@click.option(
    "--model",
    default=DEFAULT_MODEL,
    show_default=True,
    help="A Hugging Face directory, a .gguf file (or any part of one), or the built-in demo model's name.",
)
@click.option("--model-name", default="", help="The name clients ask for; by default the model's own.")
@click.option(
    "--weight", "weights", type=click.IntRange(min=1), default=1, show_default=True, help="Weight nodes."
)
@click.option(
    "--attention", type=click.IntRange(min=0), default=1, show_default=True, help="Attention nodes."
)
@click.option(
    "--standby", type=click.IntRange(min=0), default=0, show_default=True,
    help="Attention nodes kept started ahead of need; `scale` then takes one in well under a second.",
)  # fmt: skip
@click.option(
    "--zygote/--no-zygote", default=True, show_default=True,
    help="Fork attention nodes from a process that has all imported, rather than import anew each time.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True,
    help="Of weights and KV. float32 gives the exact same tokens however the KV is split.",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="cuda: all nodes on the first GPU that is visible (CUDA_VISIBLE_DEVICES).",
)  # fmt: skip
@click.option("--hop", type=click.Choice(HOPS), default="auto", show_default=True, help=HOP_HELP)
@click.option("--allow-time-slicing", is_flag=True, help="Let nodes share a GPU without MPS, slow as it is.")
@click.option(
    "--kv-memory",
    default="",
    metavar="SIZE",
    help="KV memory of each attention node, like 512MiB or 25%; on a GPU by default its part of it.",
)
@click.option("--detach", is_flag=True, help="Return once it is ready; it goes on in the background.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Where the HTTP API listens; 0.0.0.0 for everyone."
)
@click.option(
    "--node-host", default="127.0.0.1", show_default=True, metavar="ADDRESS",
    help="An address of this machine, where nodes of other machines reach its nodes; those bring an --etcd.",
)  # fmt: skip
@click.option("--http-port", type=PORT, default=8000, show_default=True, help="Of the OpenAI API.")
@click.option("--admin-port", type=PORT, default=9400, show_default=True, help="Of the admin API.")
@click.option(
    "--metrics-port", type=click.IntRange(0, 65535), default=0, show_default="a free one",
    help="Of the controller's /metrics and /sd, where Prometheus finds all the others.",
)  # fmt: skip
@click.option("--etcd-port", type=PORT, default=2379, show_default=True, help="Of the etcd it runs.")
@click.option("--etcd", default="", metavar="HOST:PORT[,…]", help="Use this etcd rather than running one.")
@etcd_security_options
@click.option(
    "--timeout", "timeout_s", type=DURATION, default="2m", show_default=True, help="Until it must be ready."
)
@click.option("--dry-run", is_flag=True, help="Check all of it and say what would run; start nothing.")
@name_option
@data_dir_option
def up(detach: bool, dry_run: bool, allow_time_slicing: bool, **settings: Any) -> None:
    """Run a whole cluster on this machine: etcd, controller, weight and attention nodes, router.

    It stops, all of it, on Ctrl-C or `flumectl down`. A process that dies meanwhile is started again.

    \b
    Examples:
      flumectl up
      flumectl up --attention 2 --detach
      flumectl up --model ./Llama-3.2-1B-Instruct --http-port 8080
      flumectl up --name two --http-port 8001 --admin-port 9401 --etcd-port 2380
      flumectl up --device cuda --model ./Llama-3.1-8B --timeout 5m
      flumectl up --etcd https://etcd-0:2379,https://etcd-1:2379 --etcd-ca ca.pem
    """
    config = ClusterConfig(**settings)
    gpu = require_gpu(allow_time_slicing=allow_time_slicing) if config.device == "cuda" else None
    try:
        _ = config.store
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    try:
        model = check(config)
        if gpu is not None and not config.kv_memory:
            config = _with_budget(config, model, gpu)
        if dry_run:
            click.echo(_would_run(config, config.model_name or model.name))
        elif detach:
            _detach(config)
        else:
            asyncio.run(foreground.run(config))
    except (*foreground.REFUSALS, TooLittleMemory) as error:
        raise CommandError(str(error)) from error


def _with_budget(config: ClusterConfig, model: ModelSource, gpu: Gpu) -> ClusterConfig:
    """With KV memory said in bytes: shares of what is free would depend on who starts first."""
    each = kv_bytes(
        gpu.memory_bytes,
        gpu.memory_bytes - gpu.memory_used_bytes,
        model_bytes(model, config.dtype),
        weights=config.weights,
        attention=config.attention + config.standby,
    )
    click.echo(f"{gpu.name}: {each >> 20} MiB of KV for each attention node (--kv-memory)")
    return msgspec.structs.replace(config, kv_memory=f"{each >> 20}MiB")


def _would_run(config: ClusterConfig, model: str) -> str:
    parts = [
        f"{'the etcd at' if config.etcd else 'an etcd on'} {config.endpoints}",
        f"a controller on {config.admin_address}",
        f"{config.weights} weight and {config.attention} attention nodes",
        f"a router on {config.http_url}",
    ]
    return f"cluster {config.name!r} would serve {model} with {', '.join(parts)} (dry run)"


def _detach(config: ClusterConfig) -> None:
    """Run `up` in a session of its own and show its output until it is ready."""
    output = config.files.directory / "up.out"
    output.parent.mkdir(parents=True, exist_ok=True)
    reader = LineReader(output, at_end=True)
    with output.open("ab") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", foreground.__name__, foreground.encode(config)],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # asked to end, it ends what it began, too
    try:
        _follow(child, config, reader)
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise


def _follow(child: subprocess.Popen[bytes], config: ClusterConfig, reader: LineReader) -> None:
    while True:
        ended, ready = child.poll() is not None, _is_ready(child, config)
        _show(reader.lines())
        if ended:
            raise SystemExit(1)
        if ready:
            return
        time.sleep(FOLLOW_POLL_S)


def _is_ready(child: subprocess.Popen[bytes], config: ClusterConfig) -> bool:
    record = config.files.read()
    return record is not None and record.supervisor.pid == child.pid and record.state is ClusterState.READY


def _show(lines: list[str]) -> None:
    failed = False
    for line in lines:
        # An error may have several lines; it is the last thing such a process says.
        failed = failed or line.startswith("Error: ")
        click.echo(line, err=failed)
