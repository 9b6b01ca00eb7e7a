"""Flags of an attention node. Nothing here needs torch."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from flume_common.direct_region import HOP_HELP, HOPS
from flume_common.etcd_flags import add_etcd_flags, store_config
from flume_common.layout import DTYPE_BYTES
from flume_common.metrics_page import METRICS_LISTEN, METRICS_LISTEN_HELP
from flume_common.store import StoreConfig

from flume_attention.errors import ConfigRefused

_EXAMPLES = """examples:
  python -m flume_attention --etcd 127.0.0.1:2379
  python -m flume_attention --etcd e1:2379,e2:2379 --cluster prod --node attention-7 --kv-memory 8GiB
  python -m flume_attention --listen 0.0.0.0:9300 --advertise-host 10.0.3.7 --kv-memory 60%
  python -m flume_attention --metrics-listen 0.0.0.0:9301 # then: curl HOST:9301/metrics
  python -m flume_attention --device cuda --kv-memory 40GiB

SIGTERM stops at once: what the node holds is gone, and weight nodes recompute it elsewhere.
Drain it first (flumectl scale, or the Drain call) to lose nothing.
"""


@dataclass(frozen=True, slots=True)
class Config:
    cluster: str
    node: str
    store: StoreConfig
    listen: str
    metrics_listen: str
    advertise_host: str
    kv_memory: str
    dtype: str | None  # the only one taken; None: whatever the weight node brings
    device: str
    threads: int
    prefill_threads: int
    spin_us: float
    lanes_host: str  # empty: that of `listen`
    orphan_grace_s: float
    pull_tokens_per_step: int
    lease_ttl_s: float
    engine_silence_s: float
    hop: str
    standby: str  # empty: join at once
    log_level: str


def flags() -> argparse.ArgumentParser:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        prog="python -m flume_attention",
        description="An attention node: holds keys and values of token ranges and answers attention over "
        "them. It has no model; weight nodes bring the shape of theirs when they attach.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cluster", default="default", help="name under which etcd holds this cluster")
    add("--node", default=f"attention-{socket.gethostname()}", help="this node's id, unique in it")
    add_etcd_flags(add)
    add("--listen", default="127.0.0.1:0", help="gRPC address; port 0 takes a free one")
    add("--metrics-listen", default=METRICS_LISTEN, metavar="HOST:PORT", help=METRICS_LISTEN_HELP)
    add("--advertise-host", default="", help="host that peers dial; default: that of --listen")
    add(
        "--kv-memory",
        default="25%",
        help="memory for KV: a size (512MiB, 2GiB) or a share of what is free at start; pages are used as "
        "tokens come, so several nodes of one machine can each have their share; default %(default)s",
    )
    add("--dtype", default="auto", choices=["auto", *sorted(DTYPE_BYTES)], help="refuse any other KV")
    add(
        "--device",
        default="cpu",
        choices=["cpu", "cuda"],
        help="cuda: the first GPU this process sees (CUDA_VISIBLE_DEVICES); --kv-memory is of that, and "
        "taken whole at start",
    )
    add("--threads", type=int, default=1, help="threads for steps of few queries; default 1")
    add(
        "--prefill-threads", type=int, default=cores, help="threads for steps of many queries; default: cores"
    )
    add("--spin-us", type=float, default=50.0, help="how long the engine looks for messages before it sleeps")
    add(
        "--lanes-host",
        default="",
        metavar="ADDRESS",
        help="lanes use only the network card that has this address; default: the host of --listen",
    )
    add(
        "--orphan-grace-s",
        type=float,
        default=30.0,
        help="how long to keep what a weight node left when it died, for another one to take over; 0: not",
    )
    add(
        "--pull-tokens-per-step",
        type=int,
        default=64,
        help="most tokens to read from another node, or let it read, between two steps, so that decode does "
        "not notice when ranges move off a node that drains by a deadline; default %(default)s",
    )
    add("--lease-ttl-s", type=float, default=10.0, help="how long a silent node stays listed")
    add(
        "--engine-silence-s",
        type=float,
        default=15.0,
        help="an engine that answers its supervisor nothing for so long is replaced, unless it compiles "
        "kernels for a new lane; default %(default)s",
    )
    add("--hop", default="auto", choices=HOPS, help=HOP_HELP)
    add(
        "--standby",
        default="",
        metavar="SOCKET",
        help="start, but join nothing before being told the node's id on this abstract Unix socket",
    )
    add("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser


def parse(argv: Sequence[str] | None = None) -> Config:
    """Raises ConfigRefused naming the flag and what it may be; argparse exits for what it can tell itself."""
    values = vars(flags().parse_args(argv))
    etcd = {name: values.pop(name) for name in list(values) if name.startswith("etcd")}
    try:
        values["store"] = store_config(etcd)
    except ValueError as error:
        raise ConfigRefused(str(error)) from error
    values["dtype"] = None if values["dtype"] == "auto" else values["dtype"]
    config = Config(**values)
    for name in ("threads", "prefill_threads", "pull_tokens_per_step"):
        if getattr(config, name) < 1:
            raise ConfigRefused(f"{_flag(name)} must be at least 1, got {getattr(config, name)}")
    if config.spin_us < 0:
        raise ConfigRefused(f"--spin-us must not be negative, got {config.spin_us}")
    if config.orphan_grace_s < 0:
        raise ConfigRefused(f"--orphan-grace-s must not be negative, got {config.orphan_grace_s}")
    if config.engine_silence_s < 1:
        raise ConfigRefused(f"--engine-silence-s must be at least 1, got {config.engine_silence_s}")
    if config.lease_ttl_s < 2:
        raise ConfigRefused(f"--lease-ttl-s must be at least 2, got {config.lease_ttl_s}")
    return config


def engine_args(config: Config, kv_bytes: int) -> list[str]:
    """The engine's command line."""
    dtype = [] if config.dtype is None else ["--dtype", config.dtype]
    lanes_host = config.lanes_host or config.listen.rpartition(":")[0]
    return [
        *("--kv-bytes", str(kv_bytes), *dtype, "--device", config.device, "--threads", str(config.threads)),
        *("--prefill-threads", str(config.prefill_threads), "--spin-us", str(config.spin_us)),
        *("--orphan-grace-s", str(config.orphan_grace_s), "--lanes-host", lanes_host),
        *("--pull-tokens-per-step", str(config.pull_tokens_per_step), "--hop", config.hop),
    ]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
