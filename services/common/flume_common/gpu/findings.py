"""What a machine's facts mean: which hop nodes would take, and what keeps them off its GPUs. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from flume_common.gpu.limits import Limits
from flume_common.gpu.mps import Mps
from flume_common.gpu.nvml import Driver
from flume_common.gpu.round_trip import DIRECT, RoundTrip, Ucx

LEAST_COMPUTE_CAPABILITY = (8, 0)  # Ampere
LEAST_SHARED_BYTES = 256 << 20
TIME_SLICE_HOP_US = 4400  # two processes on one card without MPS, measured
SHARED_TRANSPORTS = ("posix", "sysv", "cma", "xpmem", "knem")
GPU_TRANSPORTS = ("cuda_copy", "cuda_ipc", "gdr_copy")
PINNING_TRANSPORTS = ("rc", "ud", "dc")


class Status(StrEnum):
    OK = "ok"
    NONE = "none"  # not there, and nothing needs it
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Facts:
    """A machine. Strings stand for what could not be found out, and say why."""

    driver: Driver | str
    mps: Mps
    limits: Limits
    ucx: Ucx | str
    torch: str = ""  # its version as installed, "2.13.0+cpu" where it is built without CUDA
    direct: tuple[RoundTrip, ...] | str = ()  # by device memory; none where there is no GPU to try it on


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    status: Status
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Hop:
    """How a query would get from a weight node to an attention node on this machine."""

    name: str
    why: str
    measured: tuple[RoundTrip, ...] = ()


def hop(facts: Facts) -> Hop | None:
    """None when there is no way at all. Nodes choose between the first two when they attach."""
    if facts.direct and not isinstance(facts.direct, str):
        return Hop("direct", "both nodes' GPUs are on this host and map the same memory", facts.direct)
    if isinstance(facts.ucx, str):
        return None
    names = {resource.split("/")[0] for resource in facts.ucx.resources}
    trips = {trip.transport: trip for trip in facts.ucx.round_trips}
    if names & set(SHARED_TRANSPORTS) and "shared memory" in trips:
        return Hop("shared memory", "both nodes are on this host", _of(facts.ucx, "shared memory"))
    if "TCP" in trips:
        return Hop("TCP", "UCX has no shared memory here", _of(facts.ucx, "TCP"))
    return None


def obstacles(facts: Facts, *, allow_time_slicing: bool = False) -> list[str]:
    """Everything that keeps a cluster off this machine's GPUs, each with what to do; none: it may start."""
    if isinstance(facts.driver, str):
        found = [f"no GPU can be used: {facts.driver}"]
    elif not facts.driver.gpus:
        found = ["no GPU can be used: the driver knows of none"]
    else:
        found = _of_cards(facts.driver, facts.mps, allow_time_slicing)
    if facts.torch.endswith("+cpu"):
        found.append(f"torch {facts.torch} is built without CUDA: install a build with it")
    return found


def _of_cards(driver: Driver, mps: Mps, allow_time_slicing: bool) -> list[str]:
    found = [
        f"{gpu.name} has compute capability {gpu.compute_capability}; 8.0 (Ampere) or newer is needed"
        for gpu in driver.gpus
        if tuple(map(int, gpu.compute_capability.split("."))) < LEAST_COMPUTE_CAPABILITY
    ]
    if not mps.running and not allow_time_slicing:
        how = "start it with nvidia-cuda-mps-control -d" if mps.installed else "it is not installed"
        found.append(
            f"the nodes of a local cluster would share one GPU without MPS ({how}): the card then gives each"
            " its time slice, and each layer of each token takes"
            f" {TIME_SLICE_HOP_US / 1e3:g} ms instead of tens of microseconds;"
            " --allow-time-slicing starts them nevertheless"
        )
    return found


def findings(facts: Facts, *, for_gpus: bool = False) -> list[Finding]:
    """All of it, one line each, most basic first. What keeps nodes off GPUs counts as a failure only
    `for_gpus`."""
    return [
        *_gpus(facts.driver),
        _mps(facts),
        *_isolation(facts),
        _ucx(facts.ucx),
        *_gpudirect(facts),
        _locked(facts),
        _shared(facts.limits),
        *_hops(facts),
        *_nodes(facts, for_gpus),
    ]


def _gpus(driver: Driver | str) -> list[Finding]:
    if isinstance(driver, str):
        return [Finding("gpu", Status.NONE, driver)]
    found = [Finding("driver", Status.OK, f"{driver.version}, CUDA {driver.cuda}")]
    for gpu in driver.gpus:
        mig = ", cut into MIG instances" if gpu.mig else ""
        memory = f"{gpu.memory_bytes / 2**30:.0f} GiB, {gpu.memory_used_bytes / 2**30:.0f} in use"
        old = tuple(map(int, gpu.compute_capability.split("."))) < LEAST_COMPUTE_CAPABILITY
        found.append(
            Finding(
                f"gpu {gpu.index}",
                Status.WARNING if old else Status.OK,
                f"{gpu.name}, {memory}, compute {gpu.compute_capability}{mig}",
                "kernels need compute capability 8.0 or newer" if old else "",
            )
        )
    return found if driver.gpus else [*found, Finding("gpu", Status.NONE, "the driver knows of none")]


def _mps(facts: Facts) -> Finding:
    mps = facts.mps
    if mps.running:
        return Finding("mps", Status.OK, f"running at {mps.pipes}")
    what = "installed, not running" if mps.installed else "not installed"
    if not _cards(facts):
        return Finding("mps", Status.NONE, what)
    cost = f"nodes that share a card need it: a hop takes {TIME_SLICE_HOP_US / 1e3:g} ms without"
    return Finding("mps", Status.WARNING, what, f"{cost}; nvidia-cuda-mps-control -d")


def _isolation(facts: Facts) -> list[Finding]:
    """Who dies with whom."""
    cards = _cards(facts)
    if not cards:
        return []
    if facts.mps.running:
        what = "MPS: a node killed inside a kernel takes the others on its card down; sequences recover"
        return [Finding("isolation", Status.WARNING, what, "separate cards, or MIG instances, per node")]
    return [Finding("isolation", Status.OK, "processes do not share a fate without MPS")]


def _ucx(ucx: Ucx | str) -> Finding:
    if isinstance(ucx, str):
        return Finding("ucx", Status.FAILED, ucx, "install ucxx-cu12 or ucxx-cu13")
    names = dict.fromkeys(resource.split("/")[0] for resource in ucx.resources)
    return Finding("ucx", Status.OK, f"{ucx.version}: {', '.join(names)}")


def _gpudirect(facts: Facts) -> list[Finding]:
    """Between hosts a lane's frames are pinned host memory, whatever UCX could do with a card's."""
    if isinstance(facts.ucx, str) or not _cards(facts):
        return []
    names = [name for name in GPU_TRANSPORTS if any(r.split("/")[0] == name for r in facts.ucx.resources)]
    what = f"UCX moves device memory by {', '.join(names)}" if names else "UCX here moves no device memory"
    return [Finding("gpudirect", Status.NONE, f"{what}; nodes send from pinned host memory")]


def _locked(facts: Facts) -> Finding:
    locked = facts.limits.locked_bytes
    if locked is None:
        return Finding("locked memory", Status.OK, "unlimited")
    rdma = not isinstance(facts.ucx, str) and any(
        resource.split("_")[0] in PINNING_TRANSPORTS for resource in facts.ucx.resources
    )
    what = f"{_size(locked)} a process"
    if rdma:
        remedy = "RDMA registers every lane's buffers: ulimit -l unlimited"
        return Finding("locked memory", Status.WARNING, what, remedy)
    return Finding("locked memory", Status.OK, f"{what}; nothing here registers memory with a network card")


def _shared(limits: Limits) -> Finding:
    what = f"{_size(limits.shared_free_bytes)} of {_size(limits.shared_bytes)} free in /dev/shm"
    if limits.shared_free_bytes < LEAST_SHARED_BYTES:
        remedy = "lanes on one host lie there: give the container more (docker run --shm-size 1g)"
        return Finding("shared memory", Status.WARNING, what, remedy)
    return Finding("shared memory", Status.OK, what)


def _hops(facts: Facts) -> list[Finding]:
    if isinstance(facts.ucx, str):
        return []
    found = [Finding(f"{name} round trip", Status.WARNING, why) for name, why in facts.ucx.failures.items()]
    if isinstance(facts.direct, str):
        found.append(Finding(f"{DIRECT} round trip", Status.WARNING, facts.direct))
    elif facts.direct:
        found.append(Finding(f"{DIRECT} round trip", Status.OK, _times(facts.direct)))
    chosen = hop(facts)
    for name in dict.fromkeys(trip.transport for trip in facts.ucx.round_trips):
        found.append(Finding(f"{name} round trip", Status.OK, _times(_of(facts.ucx, name))))
    if chosen is None:
        return [*found, Finding("hop", Status.FAILED, "nodes cannot reach each other", "see UCX_TLS")]
    return [*found, Finding("hop", Status.OK, f"{chosen.name}: {chosen.why}")]


def _nodes(facts: Facts, for_gpus: bool) -> list[Finding]:
    status = Status.FAILED if for_gpus else Status.NONE
    against = [Finding("nodes on gpus", status, why) for why in obstacles(facts)]
    return against or [Finding("nodes on gpus", Status.OK, "possible")]


def _cards(facts: Facts) -> int:
    return 0 if isinstance(facts.driver, str) else len(facts.driver.gpus)


def _of(ucx: Ucx, transport: str) -> tuple[RoundTrip, ...]:
    return tuple(trip for trip in ucx.round_trips if trip.transport == transport)


def _times(trips: tuple[RoundTrip, ...]) -> str:
    return ", ".join(f"{_size(trip.size_bytes)} {trip.p50_us:g} us (p99 {trip.p99_us:g})" for trip in trips)


def _size(size_bytes: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size_bytes >= 1 << shift:
            return f"{size_bytes / (1 << shift):.3g} {unit}"
    return f"{size_bytes} B"
