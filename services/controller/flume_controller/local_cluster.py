"""A whole cluster on this machine: etcd, controller, weight nodes, router. What `flumectl up` runs.

* ClusterError
  + AlreadyRunning   this cluster, or one that left processes behind
  + PortsInUse       others listen where it would
  + StoreNotUsable   the given etcd does not answer, or already knows this cluster
  + StartTimeout     something was not ready in time
  + AttentionFailed  an attention node ended while starting
(and `supervise.ChildFailed`, `ModelSourceError`, `EtcdNotFound`)
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import os
import shlex
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import grpc
import msgspec
from flume_common.etcd_binary import PortInUse, etcd_command, find_etcd, free_port, require_free
from flume_common.etcd_flags import etcd_arguments, store_config
from flume_common.keys import Keys
from flume_common.membership import Member, Members, Role, State, watch_members
from flume_common.model_source import ModelSource, resolve_model
from flume_common.reasons import Reason
from flume_common.store import Store, StoreConfig, StoreError, StoreUnavailable, connect
from flume_protos.v1 import admin_pb2, admin_pb2_grpc

from flume_controller import processes
from flume_controller.cluster_files import (
    DEFAULT_DATA_DIR,
    DEFAULT_NAME,
    ClusterFiles,
    ClusterRecord,
    ClusterState,
    clusters_of,
)
from flume_controller.logfiles import last_lines
from flume_controller.spec import AttentionStatus
from flume_controller.status import NODE_CRASHED
from flume_controller.supervise import Supervisor
from flume_controller.views import Report as AttentionReport
from flume_controller.views import watch_status

Report = Callable[[str], None]
"""Takes one line for people."""

DEFAULT_MODEL = "smollm2-135m"
STOP_GRACE_S = 10.0
PROBE_S = 0.1
LOOPBACK = "127.0.0.1"
CONTROLLER, ROUTER = "controller-1", "router-1"

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class ClusterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What `flumectl up` was asked for."""

    name: str = DEFAULT_NAME
    data_dir: Path = DEFAULT_DATA_DIR
    model: str = DEFAULT_MODEL
    model_name: str = ""  # empty: the model's own
    weights: Annotated[int, msgspec.Meta(ge=1)] = 1
    attention: Annotated[int, msgspec.Meta(ge=0)] = 1
    standby: Annotated[int, msgspec.Meta(ge=0)] = 0
    zygote: bool = True
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: Literal["cpu", "cuda"] = "cpu"
    hop: Literal["auto", "frames"] = "auto"  # as of a weight node
    kv_memory: str = ""  # empty: the attention node's default
    weight_args: tuple[str, ...] = ()  # more options for every weight node
    host: str = LOOPBACK
    node_host: str = LOOPBACK  # where nodes listen for one another
    http_port: Port = 8000
    admin_port: Port = 9400
    metrics_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0  # of the controller; 0: a free one
    etcd_port: Port = 2379
    etcd: str = ""  # endpoints of an existing one; empty: run our own
    etcd_ca: str = ""  # how to get in there; see flume_common.etcd_flags
    etcd_cert: str = ""
    etcd_key: str = ""
    etcd_user: str = ""
    timeout_s: float = 120.0

    @property
    def files(self) -> ClusterFiles:
        return ClusterFiles(self.data_dir, self.name)

    @property
    def endpoints(self) -> str:
        return self.etcd or f"{LOOPBACK}:{self.etcd_port}"

    @property
    def store(self) -> StoreConfig:
        """Raises ValueError naming --etcd."""
        if not self.etcd:
            return StoreConfig.parse(self.endpoints)
        return store_config(msgspec.structs.asdict(self))

    @property
    def admin_address(self) -> str:
        return f"{LOOPBACK}:{self.admin_port}"

    @property
    def http_url(self) -> str:
        host = LOOPBACK if self.host in ("0.0.0.0", "::", "") else self.host
        return f"http://{host}:{self.http_port}"

    @property
    def ports(self) -> dict[str, tuple[str, int]]:
        """Where it listens, by the flag that says so: host and port."""
        own_etcd = {} if self.etcd else {"--etcd-port": (LOOPBACK, self.etcd_port)}
        return {
            "--http-port": (self.host, self.http_port),
            "--admin-port": (LOOPBACK, self.admin_port),
            **({"--metrics-port": (LOOPBACK, self.metrics_port)} if self.metrics_port else {}),
            **own_etcd,
        }


class ClusterError(Exception):
    """Base of what keeps a cluster from running; one line with a remedy."""


class AlreadyRunning(ClusterError):
    pass


class PortsInUse(ClusterError):
    def __init__(self, busy: Mapping[str, int], owners: Mapping[int, str]) -> None:
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


def check(config: ClusterConfig) -> ModelSource:
    """Everything that can be told before anything is started; the model.

    Raises ClusterError, ModelSourceError, EtcdNotFound.
    """
    running = config.files.read()
    if running is not None and running.running:
        raise AlreadyRunning(_already(config.name, running))
    if left := config.files.leftovers():
        names = ", ".join(record.id for record in left)
        raise AlreadyRunning(
            f"an earlier `up` of cluster {config.name!r} ended without stopping {names}: "
            f"`flumectl down{_name_flag(config.name)}` cleans up"
        )
    _check_ports(config)
    if not config.etcd:
        find_etcd()
    return resolve_model(config.model)


def _already(name: str, running: ClusterRecord) -> str:
    return (
        f"cluster {name!r} is already running at {running.http_url} (pid {running.supervisor.pid}): "
        f"`flumectl down{_name_flag(name)}` stops it, --name runs another beside it"
    )


def _check_ports(config: ClusterConfig) -> None:
    for (flag, (_, port)), (other, (_, other_port)) in itertools.combinations(config.ports.items(), 2):
        if port == other_port:
            raise ClusterError(f"{flag} and {other} are both {port}: they must differ")
    busy = {flag: port for flag, (host, port) in config.ports.items() if not _is_free(port, host)}
    if busy:
        owners = {port: other.name for other in clusters_of(config.data_dir) for port in other.ports.values()}
        raise PortsInUse(busy, owners)


def _is_free(port: int, host: str) -> bool:
    try:
        require_free(port, host)
    except PortInUse:
        return False
    return True


def _busy_port(flag: str, port: int, owner: str | None) -> str:
    if owner is not None:
        return (
            f"port {port} is in use by cluster {owner!r}: "
            f"`flumectl down{_name_flag(owner)}` stops it, or choose another with {flag}"
        )
    return (
        f"port {port} is in use: choose another with {flag} "
        "(`flumectl down` stops a running KernelFlume cluster)"
    )


def _name_flag(name: str) -> str:
    return "" if name == DEFAULT_NAME else f" --name {name}"


@asynccontextmanager
async def local_cluster(config: ClusterConfig, report: Report) -> AsyncIterator[ClusterRecord]:
    """Runs while the body does, from ready on; then, or when starting failed, everything is stopped.

    Processes that die meanwhile are started again. Cancelling the task stops it in order, too.
    Raises what `check` does, ChildFailed, StoreNotUsable, StartTimeout.
    """
    source = check(config)
    with config.files.lock() as ours:
        if not ours:
            raise AlreadyRunning(
                f"cluster {config.name!r} is being started or stopped by another command: try again"
            )
        try:
            async with asyncio.TaskGroup() as tasks:
                supervisor = Supervisor(config.files, tasks, report)
                start = _Start(config, source, supervisor, report)
                try:
                    yield await start.run()
                finally:
                    await start.undo()
        except BaseExceptionGroup as errors:
            if len(errors.exceptions) > 1:
                raise
            raise errors.exceptions[0] from None


class _Start:
    """Brings a cluster up step by step, and down again."""

    def __init__(
        self, config: ClusterConfig, source: ModelSource, supervisor: Supervisor, report: Report
    ) -> None:
        self._config = config
        self._source = source
        self._supervisor = supervisor
        self._report = report
        self._files = config.files
        self._keys = Keys(config.name)
        self._model_name = config.model_name or source.name
        self._began_s = time.monotonic()
        self._waiting_for: list[str] = []

    async def run(self) -> ClusterRecord:
        self._clean()
        record = self._record(ClusterState.STARTING)
        self._files.write(record)
        config = self._config
        self._report(
            f"cluster {config.name}: {self._model_name}, {config.dtype} on {config.device}; "
            f"logs in {self._files.logs}"
        )
        try:
            async with asyncio.timeout(config.timeout_s):
                await self._everything()
        except TimeoutError:
            raise StartTimeout(self._waiting_for, config.timeout_s, self._files.logs) from None
        self._supervisor.settled()
        record = msgspec.structs.replace(record, state=ClusterState.READY)
        self._files.write(record)
        return record

    async def undo(self) -> None:
        self._files.write(self._record(ClusterState.STOPPING))
        try:
            await self._supervisor.stop_all(STOP_GRACE_S)
        except asyncio.CancelledError:
            self._supervisor.kill_all()
            raise
        finally:
            shutil.rmtree(self._files.etcd, ignore_errors=True)
            self._files.forget()

    async def _everything(self) -> None:
        async with connect(self._config.store) as store:
            await self._start_store(store)
            self._start_controller()
            self._start_models()
            async with watch_members(store, self._keys) as members, watch_status(store, self._keys) as report:
                await self._until_ready(members, report, [CONTROLLER])
                # A given etcd may hold a wish from earlier.
                await self._wish()
                await self._until_ready(members, report, self._nodes())
            if self._config.attention:  # without, no request can be answered before a scale
                self._waiting_for = [ROUTER]
                await _until_answered(self._config)

    async def _start_store(self, store: Store) -> None:
        self._waiting_for = ["etcd"]
        if self._config.etcd:
            await _require_unused(store, self._config)
        else:
            self._supervisor.start("etcd", "etcd", own_etcd(self._files.etcd, self._config.etcd_port))
            await _until_store_answers(store)
        self._is_ready("etcd")

    def _start_controller(self) -> None:
        config = self._config
        self._supervisor.start(
            CONTROLLER,
            Role.CONTROLLER,
            self._python(
                "flume_controller",
                *("--node", CONTROLLER, "--listen", config.admin_address),
                *("--metrics-listen", f"{LOOPBACK}:{config.metrics_port}"),
                *("--data-dir", str(self._files.directory), "--attention", str(config.attention)),
                *("--standby", str(config.standby), "--zygote" if config.zygote else "--no-zygote"),
                *("--provider", "local", "--attention-args", shlex.join(self._attention_args())),
            ),
        )

    def _start_models(self) -> None:
        model = ("--model", str(self._source.path), "--model-name", self._model_name)
        for number in range(1, self._config.weights + 1):
            listen = ("--node", f"weight-{number}", "--listen", f"{self._config.node_host}:0")
            kind = ("--dtype", self._config.dtype, "--device", self._config.device, "--hop", self._config.hop)
            argv = self._python("flume_weight", *listen, *model, *kind, *self._config.weight_args)
            self._supervisor.start(f"weight-{number}", Role.WEIGHT, argv)
        http = f"{self._config.host}:{self._config.http_port}"
        grpc_at = f"{self._config.node_host}:0"
        doors = ("--node", ROUTER, "--listen-http", http, "--listen-grpc", grpc_at)
        self._supervisor.start(ROUTER, Role.ROUTER, self._python("flume_router", *doors, *model))

    def _attention_args(self) -> list[str]:
        memory = ["--kv-memory", self._config.kv_memory] if self._config.kv_memory else []
        listen = ["--listen", f"{self._config.node_host}:0"]
        return [*listen, "--dtype", self._config.dtype, "--device", self._config.device, *memory]

    def _python(self, module: str, *args: str) -> list[str]:
        common = ("--cluster", self._config.name, *etcd_arguments(self._config.store))
        return [sys.executable, "-m", module, *common, *args]

    async def _until_ready(self, members: Members, report: AttentionReport, nodes: Iterable[str]) -> None:
        missing = set(nodes)
        while missing:
            ready = {m.id for m in members.current.values() if self._is_up(m)}
            for node in sorted(missing & ready):
                self._is_ready(node)
            missing -= ready
            self._waiting_for = sorted(missing)
            self._require_attention_alive(report.status)
            if missing:
                await _changed_or_soon(members)

    def _is_up(self, member: Member) -> bool:
        """A weight node serves only with a lane to an attention node, and none may be wanted."""
        lacks_attention = not self._config.attention and member.reason == Reason.NO_LANE
        return member.state is State.READY or lacks_attention

    def _nodes(self) -> list[str]:
        """Everything but the controller."""
        weights = [f"weight-{number}" for number in range(1, self._config.weights + 1)]
        attention = [f"attention-{number}" for number in range(1, self._config.attention + 1)]
        return [ROUTER, *weights, *attention]

    def _require_attention_alive(self, status: AttentionStatus | None) -> None:
        for condition in status.conditions if status else ():
            if condition.reason == NODE_CRASHED:
                missing = [node for node in self._waiting_for if node.startswith(Role.ATTENTION)]
                raise AttentionFailed(condition.message, missing, self._files.logs)

    async def _wish(self) -> None:
        async with grpc.aio.insecure_channel(self._config.admin_address) as channel:
            stub = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
            await stub.Scale(
                admin_pb2.ScaleRequest(replicas=self._config.attention, actor="user"), timeout=10
            )

    def _clean(self) -> None:
        """What an earlier run of this cluster left; its processes are gone."""
        shutil.rmtree(self._files.etcd, ignore_errors=True)
        for path in self._files.logs.glob("*.log"):
            path.unlink()
        for record in self._files.records.all():
            self._files.records.remove(record.id)

    def _is_ready(self, what: str) -> None:
        self._report(f"  {what:<14} ready   {time.monotonic() - self._began_s:5.1f} s")

    def _record(self, state: ClusterState) -> ClusterRecord:
        return ClusterRecord(
            name=self._config.name,
            state=state,
            supervisor=processes.record_of(os.getpid(), id="up", role="up"),
            admin_address=self._config.admin_address,
            http_url=self._config.http_url,
            etcd_endpoints=self._config.endpoints,
            model_name=self._model_name,
            ports={flag: port for flag, (_, port) in self._config.ports.items()},
        )


def own_etcd(directory: Path, port: int) -> list[str]:
    """etcd for one laptop: its data lives as long as the cluster does, so it need not reach the disk."""
    client, peer = f"http://{LOOPBACK}:{port}", f"http://{LOOPBACK}:{free_port()}"
    return etcd_command(find_etcd(), directory, client=client, peer=peer, args=["--unsafe-no-fsync"])


async def _until_store_answers(store: Store) -> None:
    while True:
        try:
            await store.status()
            return
        except StoreUnavailable:
            await asyncio.sleep(PROBE_S)


async def _until_answered(config: ClusterConfig) -> None:
    """Until the router has met the weight nodes and takes requests."""
    while not await asyncio.to_thread(_is_healthy, config):  # noqa: ASYNC110  (HTTP has no event)
        await asyncio.sleep(PROBE_S)


def _is_healthy(config: ClusterConfig) -> bool:
    address = urlsplit(config.http_url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=5.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


async def _require_unused(store: Store, config: ClusterConfig) -> None:
    try:
        members = await store.range(Keys(config.name).members)
    except StoreError as error:
        raise StoreNotUsable(f"cannot use the etcd at {config.etcd} (--etcd): {error}") from error
    if members.items:
        names = ", ".join(_member_ids(members.items))
        raise StoreNotUsable(
            f"the etcd at {config.etcd} already has members of cluster {config.name!r}: {names}; "
            "choose another --name, or wait until their leases have run out"
        )
    # Nobody is left who wrote it, and what it says would be taken for news.
    await store.delete(Keys(config.name).status_attention)


def _member_ids(keys: Iterable[str]) -> list[str]:
    return [key.rpartition("/")[2] for key in keys]


async def _changed_or_soon(members: Members) -> None:
    try:
        async with asyncio.timeout(PROBE_S):
            await members.changed()
    except TimeoutError:
        pass
