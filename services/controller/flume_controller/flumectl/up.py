"""`flumectl up`: a cluster on this machine, in the foreground or detached."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import msgspec
from flume_common.direct_region import HOP_HELP, HOPS
from flume_common.gpu.nvml import Gpu
from flume_common.model_source import ModelSource
from flume_common.unix_socket import NotPrivate

from flume_controller import cluster_config, foreground
from flume_controller.cluster_config import DEFAULT_MODEL, LOOPBACK, ClusterConfig, UnreadableConfig
from flume_controller.cluster_files import ClusterFiles, ClusterState
from flume_controller.etcd_options import etcd_security_options
from flume_controller.flumectl.doctor import require_gpu
from flume_controller.flumectl.duration import DURATION
from flume_controller.flumectl.errors import CommandError
from flume_controller.flumectl.options import data_dir_option, name_option
from flume_controller.gpu_budget import TooLittleMemory, kv_bytes, model_bytes
from flume_controller.logfiles import LineReader
from flume_controller.preflight import MAX_WEIGHT_NODES, ClusterError, Plan, check
from flume_controller.processes import open_log
from flume_controller.spec import MAX_ATTENTION_NODES

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
    "--weight", "weights", type=click.IntRange(1, MAX_WEIGHT_NODES), default=1, show_default=True,
    help="Weight nodes.",
)  # fmt: skip
@click.option(
    "--attention", type=click.IntRange(0, MAX_ATTENTION_NODES), default=1, show_default=True,
    help="Attention nodes. Where the cluster has a number from before, that counts unless this is given.",
)  # fmt: skip
@click.option(
    "--standby", type=click.IntRange(0, MAX_ATTENTION_NODES), default=0, show_default=True,
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
@click.option(
    "--cors-origins", default="", metavar="ORIGIN[,ORIGIN…]",
    help="Pages whose scripts may call the API, such as https://chat.example; * for any.",
)  # fmt: skip
@click.option("--admin-port", type=PORT, default=9400, show_default=True, help="Of the admin API.")
@click.option(
    "--metrics-port", type=click.IntRange(0, 65535), default=0, show_default="a free one",
    help="Of the controller's /metrics and /sd, where Prometheus finds all the others.",
)  # fmt: skip
@click.option(
    "--etcd-port", type=PORT, default=2379, show_default=True,
    help="Of the etcd it runs, for tools of your user such as etcdctl; others are turned away.",
)  # fmt: skip
@click.option("--etcd", default="", metavar="HOST:PORT[,…]", help="Use this etcd rather than running one.")
@etcd_security_options
@click.option(
    "--timeout", "timeout_s", type=DURATION, default="2m", show_default=True, help="Until it must be ready."
)
@click.option("--dry-run", is_flag=True, help="Check all of it and say what would run; start nothing.")
@name_option
@data_dir_option
@click.pass_context
def up(ctx: click.Context, /, detach: bool, dry_run: bool, allow_time_slicing: bool, **settings: Any) -> None:
    """Run a whole cluster on this machine: etcd, controller, weight and attention nodes, router.

    It stops, all of it, on Ctrl-C or `flumectl down`. A process that dies meanwhile is started again.

    The number of attention nodes, settings, events and the flags of `up` are kept: the next `up` brings the
    cluster back as it was, after `down` as after a crash or a reboot. Flags that are given then go before
    those of last time; `flumectl down --purge` forgets all of it. Processes that outlived an `up` that was
    killed are taken over as they run.

    \b
    Examples:
      flumectl up
      flumectl up --attention 2 --detach
      flumectl up --model ./Llama-3.2-1B-Instruct --http-port 8080
      flumectl up --name two --http-port 8001 --admin-port 9401 --etcd-port 2380
      flumectl up --device cuda --model ./Llama-3.1-8B --timeout 5m
      flumectl up --etcd https://etcd-0:2379,https://etcd-1:2379 --etcd-ca ca.pem
    """
    os.umask(0o077)  # what it writes is for this user alone
    given = {name for name in settings if ctx.get_parameter_source(name) in _GIVEN}
    try:
        config = _resumed(settings, given)
    except (UnreadableConfig, ClusterError) as error:
        raise CommandError(str(error)) from error
    gpu = require_gpu(allow_time_slicing=allow_time_slicing) if config.device == "cuda" else None
    try:
        _ = config.store
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    try:
        plan = check(config)
        if gpu is not None and not config.kv_memory and not plan.survivors:
            config = _with_budget(config, plan.model, gpu)
        if dry_run:
            click.echo(_would_run(config, plan))
        elif detach:
            _detach(config)
        else:
            asyncio.run(foreground.run(config))
    except (*foreground.REFUSALS, TooLittleMemory) as error:
        raise CommandError(str(error)) from error


_GIVEN = (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.ENVIRONMENT)
_PATHS = ("model", "etcd_ca", "etcd_cert", "etcd_key")


def _resumed(settings: dict[str, Any], given: set[str]) -> ClusterConfig:
    """What is asked for now, and for the rest what was when it was last up.

    A cluster whose processes outlived their `up` goes on with what they run with.
    Raises UnreadableConfig, ClusterError.
    """
    settings = settings | {name: _absolute(settings[name]) for name in _PATHS}
    files = ClusterFiles(settings["data_dir"], settings["name"])
    record = files.read()
    survives = record is not None and not record.running and bool(files.leftovers())
    try:
        kept = record.config if record is not None and survives else files.read_config() or {}
    except ValueError as error:
        raise UnreadableConfig(
            f"the flags of the last `up` of cluster {files.name!r} cannot be read ({error}): "
            f"remove {files.directory / 'config.json'} and give them anew"
        ) from error
    asked = ClusterConfig(**settings)
    if survives and (changed := cluster_config.differences(asked, given, kept)):
        raise ClusterError(
            f"processes of cluster {files.name!r} run on without their `up`, with another "
            f"{', '.join(changed)}: leave that out to take them over, or `flumectl down{files.flags}` first"
        )
    taken = {name: value for name, value in kept.items() if name not in given}
    if taken:
        click.echo(
            f"as last time: {cluster_config.as_flags(taken)} (flags given now go before these, "
            f"`flumectl down --purge{files.flags}` forgets them)"
        )
    config = cluster_config.resumed(settings, given, kept)
    return msgspec.structs.replace(config, set_attention="attention" in given)


def _absolute(path: str) -> str:
    """The next `up` may be called somewhere else."""
    return str(Path(path).absolute()) if path and Path(path).exists() else path


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
    return msgspec.structs.replace(config, kv_memory=f"{each >> 20}MiB", kv_measured=True)


def _would_run(config: ClusterConfig, plan: Plan) -> str:
    if plan.survivors:
        names = ", ".join(record.id for record in plan.survivors)
        return f"cluster {config.name!r} would be taken over as it runs: {names} (dry run)"
    model = config.model_name or plan.model.name
    parts = [
        f"the etcd at {config.etcd}" if config.etcd else f"an etcd on {LOOPBACK}:{config.etcd_port}",
        f"a controller on {config.admin_address}",
        f"{config.weights} weight and {config.attention} attention nodes",
        f"a router on {config.http_url}",
    ]
    return f"cluster {config.name!r} would serve {model} with {', '.join(parts)} (dry run)"


def _detach(config: ClusterConfig) -> None:
    """Run `up` in a session of its own and show its output until it is ready."""
    output = config.files.output
    try:
        config.files.make()
        reader = LineReader(output, at_end=True)
        log = open_log(output)
    except (NotPrivate, OSError) as error:
        raise CommandError(f"cannot write to {config.files.directory}: {error}") from error
    with log as file:
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
