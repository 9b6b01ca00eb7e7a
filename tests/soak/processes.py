"""Every process below this one, by what it is: nothing that a cluster started can hide.

A process whose parent died is given to us (a subreaper, see prctl(2)) rather than to init, so it stays
in sight; we also reap it.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

import psutil

PR_SET_CHILD_SUBREAPER = 36
MIB = 2**20
KV_BYTES = 1024 * MIB
"""Of an attention node."""
KINDS = {
    "flume_weight.engine_process": "weight engine",
    "flume_attention.engine": "attention engine",
    "flume_attention.zygote": "zygote",
    "flume_controller.foreground": "up",
    "flume_controller.flumectl": "flumectl",
    "flume_controller": "controller",
    "flume_weight": "weight supervisor",
    "flume_attention": "attention supervisor",
    "flume_router": "router",
}
"""By the module after `-m`."""


@dataclass(frozen=True)
class Seen:
    pid: int
    kind: str
    name: str  # kind and node
    group: int
    rss_bytes: int  # without the KV pool, which is a budget and fills up as it is used
    started_at_s: float  # with the pid: which process this is


def adopt_orphans() -> None:
    """Become the parent of whatever is orphaned below us. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def everything() -> list[Seen]:
    """All that runs below us now, but for commands of ours."""
    below = [item for process in psutil.Process().children(recursive=True) if (item := _look(process))]
    nodes = {item.group: item.name for item in below if item.kind.endswith("supervisor")}
    return [_named(item, nodes) for item in below if item.kind != "flumectl"]


def counts(seen: list[Seen]) -> Counter[str]:
    return Counter(item.kind for item in seen)


def expected(attention: int, weights: int) -> Counter[str]:
    """Of a settled cluster with three etcds beside it."""
    return Counter(
        {
            "up": 1, "controller": 1, "router": 1, "etcd": 3, "zygote": 2,
            "weight supervisor": weights, "weight engine": weights,
            "attention supervisor": attention, "attention engine": attention,
        }
    )  # fmt: skip


def _look(process: psutil.Process) -> Seen | None:
    try:
        with process.oneshot():
            if process.status() == psutil.STATUS_ZOMBIE:
                return _zombie(process)
            words = process.cmdline()
            kind = kind_of(words)
            node = node_of(words)
            name = f"{kind} {node}".strip()
            group = os.getpgid(process.pid)
            rss_bytes = process.memory_info().rss
            if kind == "attention engine":
                rss_bytes -= _pool_bytes(process)
            return Seen(process.pid, kind, name, group, rss_bytes, process.create_time())
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None


def _pool_bytes(process: psutil.Process) -> int:
    """What is resident of its KV pool: the one mapping that is about as large."""
    maps = process.memory_maps(grouped=False)
    return sum(item.rss for item in maps if item.path == "[anon]" and _size_bytes(item.addr) > 0.9 * KV_BYTES)


def _size_bytes(addresses: str) -> int:
    start, end = (int(part, 16) for part in addresses.split("-"))
    return end - start


def _zombie(process: psutil.Process) -> Seen | None:
    """One that its own parent has not reaped; those given to us we reap."""
    parent = process.ppid()
    if parent == os.getpid():
        with suppress(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)
        return None
    kind = f"zombie of {kind_of(psutil.Process(parent).cmdline())}"
    return Seen(process.pid, kind, kind, 0, 0, process.create_time())


def kind_of(words: list[str]) -> str:
    """What a command line runs."""
    line = " ".join(words)
    if words and words[0].endswith("/etcd"):
        return "etcd"
    if " -m " in line:
        module = line.split(" -m ", 1)[1].split()[0]
        return KINDS.get(module, module)
    return line[:60]


def node_of(words: list[str]) -> str:
    """The node, or etcd's member, that it names; empty when none."""
    line = " ".join(words).replace("--node=", "--node ").replace("--name=", "--name ")
    for flag in ("--node ", "--name "):
        if flag in line and not line.split(flag)[0].endswith("foreground"):
            return line.split(flag, 1)[1].split()[0]
    return ""


def _named(item: Seen, nodes: dict[int, str]) -> Seen:
    """An engine of an attention node does not say which; its process group does."""
    if item.kind != "attention engine" or item.group not in nodes:
        return item
    node = nodes[item.group].rpartition(" ")[2]
    return Seen(item.pid, item.kind, f"{item.kind} {node}", item.group, item.rss_bytes, item.started_at_s)
