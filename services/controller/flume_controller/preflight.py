"""Everything that can be said against a local cluster before any of it is started.

* ClusterError
  + AlreadyRunning   this cluster, or another command starts or stops it
  + PortsInUse       others listen where it would
  + StoreNotUsable   the given etcd does not answer, or already knows this cluster
  + StartTimeout     something was not ready in time
  + AttentionFailed  an attention node ended while starting
(and `supervise.ChildFailed`, `ModelSourceError`, `EtcdNotFound`)
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from flume_common import host_memory
from flume_common.etcd_binary import CannotBind, PortInUse, find_etcd, require_free
from flume_common.model_source import ModelSource, resolve_model
from flume_common.network_cards import devices_of

from flume_controller.cluster_config import ClusterConfig
from flume_controller.cluster_files import ClusterFiles, ClusterRecord, clusters_of
from flume_controller.disk_space import disk_space
from flume_controller.gpu_budget import model_bytes
from flume_controller.logfiles import last_lines
from flume_controller.processes import ProcessRecord
from flume_controller.spec import MAX_ATTENTION_NODES

MAX_WEIGHT_NODES = 64
CONTROLLER, ROUTER = "controller-1", "router-1"


class ClusterError(Exception):
    """Base of what keeps a cluster from running; one line with a remedy."""


class AlreadyRunning(ClusterError):
    pass


class PortsInUse(ClusterError):
    def __init__(self, busy: Mapping[str, int], owners: Mapping[int, ClusterFiles]) -> None:
        super().__init__("; ".join(_busy_port(flag, port, owners.get(port)) for flag, port in busy.items()))
        self.busy = dict(busy)


class StoreNotUsable(ClusterError):
    pass


class StartTimeout(ClusterError):
    def __init__(self, waiting_for: Sequence[str], timeout_s: float, log_dir: Path) -> None:
        what = f"not ready after {timeout_s:g} s: {', '.join(waiting_for)} (--timeout waits longer)"
        super().__init__("\n".join([what, *_last_words(waiting_for, log_dir)]))
        self.waiting_for = tuple(waiting_for)


class AttentionFailed(ClusterError):
    """The controller would go on starting it, ever more slowly."""

    def __init__(self, why: str, waiting_for: Sequence[str], log_dir: Path) -> None:
        super().__init__("\n".join([f"while starting, {why}", *_last_words(waiting_for, log_dir)]))


def _last_words(nodes: Iterable[str], log_dir: Path) -> list[str]:
    return [f"  {node}| {line}" for node in nodes for line in last_lines(log_dir / f"{node}.log", 4)]


class Plan(NamedTuple):
    """What is to be started."""

    model: ModelSource
    survivors: list[ProcessRecord]
    """Processes of this cluster that outlived the `up` that looked after them, and are to be taken over."""


def check(config: ClusterConfig) -> Plan:
    """What is wrong in itself comes before what only stands in the way now.

    Raises ClusterError, ModelSourceError, EtcdNotFound.
    """
    _check_counts(config)
    _check_addresses(config)
    _check_ports_differ(config)
    if not config.etcd:
        find_etcd()
    model = resolve_model(config.model)
    _check_memory(config, model)
    running = config.files.read()
    if running is not None and running.running:
        raise AlreadyRunning(_already(config.files, running))
    survivors = config.files.leftovers()
    _check_ports_free(config, {record.id for record in survivors})
    _check_directory(config)
    return Plan(model, survivors)


def _already(files: ClusterFiles, running: ClusterRecord) -> str:
    return (
        f"cluster {files.name!r} is already running at {running.http_url} (pid {running.supervisor.pid}): "
        f"`flumectl down{files.flags}` stops it, --name runs another beside it"
    )


def _check_counts(config: ClusterConfig) -> None:
    for flag, count, least, most in (
        ("--weight", config.weights, 1, MAX_WEIGHT_NODES),
        ("--attention", config.attention, 0, MAX_ATTENTION_NODES),
        ("--standby", config.standby, 0, MAX_ATTENTION_NODES),
    ):
        if not least <= count <= most:
            raise ClusterError(f"{flag} must be {least} to {most}, got {count}")


def _check_addresses(config: ClusterConfig) -> None:
    """That we have them is known by listening there for a moment, on a port that is free in any case."""
    for flag, host in (("--host", config.host), ("--node-host", config.node_host)):
        try:
            require_free(0, host)
        except (CannotBind, PortInUse) as error:
            raise ClusterError(f"{flag} {host}: {error}; give an address of this machine") from error
    try:
        devices_of(config.node_host)
    except ValueError as error:
        raise ClusterError(f"--node-host {config.node_host}: {error}") from error


def _check_ports_differ(config: ClusterConfig) -> None:
    for (flag, (_, port)), (other, (_, other_port)) in itertools.combinations(config.ports.items(), 2):
        if port == other_port:
            raise ClusterError(f"{flag} and {other} are both {port}: they must differ")


def _check_ports_free(config: ClusterConfig, survivors: set[str]) -> None:
    ours = {"--http-port": ROUTER, "--admin-port": CONTROLLER, "--metrics-port": CONTROLLER}
    busy = {
        flag: port
        for flag, (host, port) in config.ports.items()
        if ours.get(flag) not in survivors and not _is_free(flag, port, host)
    }
    if busy:
        owners = {
            port: ClusterFiles(config.data_dir, other.name)
            for other in clusters_of(config.data_dir)
            for port in other.ports.values()
        }
        raise PortsInUse(busy, owners)


def _is_free(flag: str, port: int, host: str) -> bool:
    try:
        require_free(port, host)
    except PortInUse:
        return False
    except CannotBind as error:
        raise ClusterError(f"{flag}: {error}") from error
    return True


def _busy_port(flag: str, port: int, owner: ClusterFiles | None) -> str:
    if owner is not None:
        return (
            f"port {port} is in use by cluster {owner.name!r}: "
            f"`flumectl down{owner.flags}` stops it, or choose another with {flag}"
        )
    return (
        f"port {port} is in use: choose another with {flag} "
        "(`flumectl down` stops a running KernelFlume cluster)"
    )


def _check_directory(config: ClusterConfig) -> None:
    """That it can be made, or is ours and has room, without making it."""
    directory = config.files.directory
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    try:
        full = disk_space(directory).full
        writable = _writable(directory)
    except OSError as error:
        raise ClusterError(f"--data-dir {config.data_dir}: {error.strerror or error}") from error
    if not writable:
        raise ClusterError(f"--data-dir {config.data_dir}: {directory} is not a directory we may write to")
    if full:
        raise ClusterError(f"--data-dir {config.data_dir}: no space left on its disk; free some")


def _writable(directory: Path) -> bool:

    return directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)


def _check_memory(config: ClusterConfig, model: ModelSource) -> None:
    """That the machine could ever hold it. What is free is not looked at, as it changes."""
    memory = host_memory.measure()
    nodes = config.attention + config.standby
    if config.kv_memory:
        try:
            each = host_memory.kv_bytes(config.kv_memory, memory) if config.device == "cpu" else 0
        except ValueError as error:
            raise ClusterError(str(error)) from error
        share = config.kv_memory.strip().endswith("%")
        if not share and each * nodes > memory.total_bytes:
            raise ClusterError(
                f"--kv-memory {config.kv_memory} for {nodes} attention nodes (--attention, --standby) is "
                f"{each * nodes >> 20} MiB, the machine has {memory.total_bytes >> 20}"
            )
    if config.device == "cpu":
        weights = config.weights * least_bytes(model)
        if weights > memory.total_bytes:
            raise ClusterError(
                f"--weight {config.weights}: as many copies of {model.name} need at least "
                f"{weights >> 20} MiB, the machine has {memory.total_bytes >> 20}"
            )


def least_bytes(model: ModelSource) -> int:
    """What one weight node holds at the very least: its parameters, as its file has them."""
    if model.kind == "gguf":
        return model.path.stat().st_size
    return model_bytes(model, "bfloat16")
