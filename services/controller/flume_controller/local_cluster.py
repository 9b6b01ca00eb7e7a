"""A whole cluster on this machine: etcd, controller, weight nodes, router. What `flumectl up` runs.

What etcd holds (number of nodes, settings, events) outlives the processes. An `up` of a cluster whose
processes are gone starts them as they were; one whose processes outlived their `up` takes those over as
they are. Errors: see `preflight`.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import shlex
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from urllib.parse import urlsplit

import grpc
import msgspec
from flume_common.etcd_flags import etcd_arguments
from flume_common.keys import Keys
from flume_common.membership import Member, Members, Role, State, watch_members
from flume_common.reasons import Reason
from flume_common.serving import CannotListen
from flume_common.store import KeyValue, Store, StoreError, StoreUnavailable, connect
from flume_common.unix_socket import NotPrivate
from flume_protos.v1 import admin_pb2, admin_pb2_grpc

from flume_controller import cluster_config, desired, log_rotation, own_etcd, processes
from flume_controller.cluster_config import DEFAULT_MODEL, LOOPBACK, ClusterConfig
from flume_controller.cluster_files import ClusterRecord, ClusterState
from flume_controller.etcd_door import etcd_door
from flume_controller.preflight import (
    CONTROLLER,
    ROUTER,
    AlreadyRunning,
    AttentionFailed,
    ClusterError,
    Plan,
    PortsInUse,
    StartTimeout,
    StoreNotUsable,
    check,
)
from flume_controller.spec import AttentionStatus
from flume_controller.status import NODE_CRASHED
from flume_controller.supervise import Supervisor
from flume_controller.supervisor_link import serve_view
from flume_controller.views import Report as AttentionReport
from flume_controller.views import watch_status

__all__ = [
    "DEFAULT_MODEL",
    "LOOPBACK",
    "AlreadyRunning",
    "AttentionFailed",
    "ClusterConfig",
    "ClusterError",
    "PortsInUse",
    "StartTimeout",
    "StoreNotUsable",
    "check",
    "local_cluster",
]

Report = Callable[[str], None]
"""Takes one line for people."""

STOP_GRACE_S = 10.0
PROBE_S = 0.1
LEASES_S = 20.0
"""How long members that died with their machine may stay listed in a given etcd."""


@asynccontextmanager
async def local_cluster(config: ClusterConfig, report: Report) -> AsyncIterator[ClusterRecord]:
    """Runs while the body does, from ready on; then, or when starting failed, everything is stopped.

    Processes that die meanwhile are started again. Cancelling the task stops it in order, too. Processes
    that an earlier `up` left are taken over, and are left again when that fails.
    Raises what `check` does, ChildFailed, StoreNotUsable, StartTimeout.
    """
    plan = check(config)
    try:
        with config.files.lock() as ours:
            if not ours:
                raise AlreadyRunning(
                    f"cluster {config.name!r} is being started or stopped by another command: try again"
                )
            try:
                async with asyncio.TaskGroup() as tasks:
                    start = _Start(config, plan, Supervisor(config.files, tasks, report), report)
                    try:
                        yield await start.run()
                    finally:
                        await start.undo()
            except BaseExceptionGroup as errors:
                if len(errors.exceptions) > 1:
                    raise
                raise errors.exceptions[0] from None
    except NotPrivate as error:
        raise ClusterError(f"--data-dir {config.data_dir}: {error}") from error


class _Start:
    """Brings a cluster up step by step, and down again."""

    def __init__(self, config: ClusterConfig, plan: Plan, supervisor: Supervisor, report: Report) -> None:
        self._config = config
        self._source = plan.model
        self._survivors = [record.id for record in plan.survivors]
        self._supervisor = supervisor
        self._report = report
        self._files = config.files
        self._keys = Keys(config.name)
        self._model_name = config.model_name or plan.model.name
        self._began_s = time.monotonic()
        self._waiting_for: list[str] = []
        self._open = AsyncExitStack()
        self._up = False

    async def run(self) -> ClusterRecord:
        self._say_what_starts()
        if not self._survivors:
            self._clean()
        record = self._record(ClusterState.STARTING)
        try:
            self._files.write(record)
            await self._open.enter_async_context(serve_view(self._files.link, self._supervisor.view))
        except OSError as error:
            raise ClusterError(f"cannot write to {self._files.directory}: {error.strerror}") from error
        if self._survivors:
            self._supervisor.settled()  # what dies now is started again: others live on what is there
        try:
            async with asyncio.timeout(self._config.timeout_s):
                await self._everything()
        except TimeoutError:
            late = StartTimeout(self._waiting_for, self._config.timeout_s, self._files.logs)
            if not self._survivors:
                raise late from None
            self._report(f"taken over, but {late}")
        self._supervisor.settled()
        record = msgspec.structs.replace(record, state=ClusterState.READY)
        with suppress(OSError):  # it runs all the same
            self._files.write_config(cluster_config.to_keep(self._config))
        with suppress(OSError):
            self._files.write(record)
        self._up = True
        return record

    async def undo(self) -> None:
        """Stop all of it. A takeover that failed leaves what it found."""
        await self._open.aclose()
        if self._survivors and not self._up:
            self._supervisor.let_go()
            return
        with suppress(OSError):
            self._files.write(self._record(ClusterState.STOPPING))
        try:
            await self._supervisor.stop_all(STOP_GRACE_S)
        except asyncio.CancelledError:
            self._supervisor.kill_all()
            raise
        finally:
            self._files.forget()

    def _say_what_starts(self) -> None:
        config = self._config
        self._report(
            f"cluster {config.name}: {self._model_name}, {config.dtype} on {config.device}; "
            f"logs in {self._files.logs}"
        )
        if self._survivors:
            self._report(f"taking over what runs: {', '.join(self._survivors)}")

    async def _everything(self) -> None:
        async with connect(self._config.store) as store:
            await self._start_store(store)
            self._start_controller()
            self._start_models()
            async with watch_members(store, self._keys) as members, watch_status(store, self._keys) as report:
                await self._until_ready(members, report, [CONTROLLER])
                if self._config.set_attention:
                    await self._scale()
                attention = await self._desired(store)
                await self._until_ready(members, report, self._nodes(), attention)
            if attention:  # without, no request can be answered before a scale
                self._waiting_for = [ROUTER]
                await _until_answered(self._config)

    async def _start_store(self, store: Store) -> None:
        self._waiting_for = ["etcd"]
        if self._config.etcd:
            if not self._survivors:
                await _require_unused(store, self._config, self._report)
        else:
            self._supervisor.start(
                own_etcd.ID, own_etcd.ROLE, own_etcd.command(self._files), cwd=self._files.sockets
            )
            await _until_store_answers(store)
            if not self._survivors:
                await _forget_the_dead(store, self._keys)
            await self._open_door()
        self._is_ready("etcd")

    async def _open_door(self) -> None:
        door = etcd_door(self._config.etcd_port, own_etcd.socket(self._files))
        try:
            await self._open.enter_async_context(door)
        except CannotListen as error:
            # Nothing of the cluster goes through it.
            self._report(f"no port for etcdctl: {error} (--etcd-port)")

    def _start_controller(self) -> None:
        config = self._config
        names = ",".join(self._files.remembered_nodes())
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
                *(("--prefer-ids", names) if names else ()),
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
        cors = ("--cors-origins", self._config.cors_origins) if self._config.cors_origins else ()
        self._supervisor.start(ROUTER, Role.ROUTER, self._python("flume_router", *doors, *cors, *model))

    def _attention_args(self) -> list[str]:
        memory = ["--kv-memory", self._config.kv_memory] if self._config.kv_memory else []
        listen = ["--listen", f"{self._config.node_host}:0"]
        return [*listen, "--dtype", self._config.dtype, "--device", self._config.device, *memory]

    def _python(self, module: str, *args: str) -> list[str]:
        common = ("--cluster", self._config.name, *etcd_arguments(self._config.store))
        return [sys.executable, "-m", module, *common, *args]

    async def _until_ready(
        self, members: Members, report: AttentionReport, nodes: Iterable[str], attention: int = 0
    ) -> None:
        """Until these are, and so many attention nodes, whatever they are called."""
        missing, said = set(nodes), set[str]()
        while True:
            ready = {m.id: m for m in members.current.values() if _is_up(m, attention)}
            of_attention = {id for id, m in ready.items() if m.role is Role.ATTENTION} if attention else set()
            for node in sorted((missing & set(ready)) | (of_attention - said)):
                self._is_ready(node)
            missing -= set(ready)
            said |= of_attention
            lacking = max(attention - len(of_attention), 0)
            self._waiting_for = sorted([*missing, *self._starting(ready, lacking)])
            if not self._survivors:
                self._require_attention_alive(report.status)
            if not missing and not lacking:
                return
            await _changed_or_soon(members)

    def _nodes(self) -> list[str]:
        """Everything but controller and attention nodes."""
        return [ROUTER, *(f"weight-{number}" for number in range(1, self._config.weights + 1))]

    def _starting(self, ready: Iterable[str], lacking: int) -> list[str]:
        """Names for attention nodes that are still to come: their own as far as they have any."""
        begun = [record.id for record in self._files.records.all() if record.role == Role.ATTENTION]
        names = [name for name in begun if name not in set(ready)]
        names += [f"attention-{number}" for number in range(1, lacking + len(names) + 1)]
        return list(dict.fromkeys(names))[:lacking]

    def _require_attention_alive(self, status: AttentionStatus | None) -> None:
        for condition in status.conditions if status else ():
            if condition.reason == NODE_CRASHED:
                missing = [node for node in self._waiting_for if node.startswith(Role.ATTENTION)]
                raise AttentionFailed(condition.message, missing, self._files.logs)

    async def _scale(self) -> None:
        async with grpc.aio.insecure_channel(self._config.admin_address) as channel:
            stub = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
            request = admin_pb2.ScaleRequest(replicas=self._config.attention, actor="user")
            await stub.Scale(request, timeout=10, wait_for_ready=True)

    async def _desired(self, store: Store) -> int:
        """How many attention nodes the cluster wants: what it kept, or has just been told."""
        while True:
            try:
                spec, _ = await desired.read(store, self._keys)
            except desired.InvalidSpec as error:
                self._report(f"not waiting for attention nodes: {error}")
                return 0
            if spec is not None:
                if spec.desired != self._config.attention:
                    self._report(
                        f"  {spec.desired} attention nodes, as before "
                        f"(`flumectl scale attention{self._files.flags} --replicas N` changes it)"
                    )
                return spec.desired
            await asyncio.sleep(PROBE_S)

    def _clean(self) -> None:
        """What an earlier run of this cluster left, whose processes are gone."""
        self._files.remember_nodes()
        for record in self._files.records.all():
            processes.kill_session(record)  # an engine may have outlived its supervisor
            self._files.records.remove(record.id)
        for intent in self._files.records.begun():
            self._files.records.remove(intent.id)
        log_rotation.begin_anew(self._files.logs.glob("*.log"))

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
            config=cluster_config.recorded(self._config),
        )


def _is_up(member: Member, attention: int) -> bool:
    """A weight node serves only with a lane to an attention node, and none may be wanted."""
    return member.state is State.READY or (not attention and member.reason == Reason.NO_LANE)


async def _until_store_answers(store: Store) -> None:
    while True:
        try:
            await store.status()
            return
        except StoreUnavailable:
            await asyncio.sleep(PROBE_S)


async def _forget_the_dead(store: Store, keys: Keys) -> None:
    """Remove what hung on the leases of processes that are gone, and what was said of them.

    None of it is true any more, and leases would begin anew with an etcd that was started again.
    """
    for prefix in (keys.members, keys.routes, keys.election):
        await store.delete_prefix(prefix)
    await store.delete(keys.status_attention)


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


async def _require_unused(store: Store, config: ClusterConfig, report: Report) -> None:
    """Members of this machine may have died with it: they get the time of their leases."""
    ends_s = time.monotonic() + LEASES_S
    said = False
    while True:
        try:
            found = await store.range(Keys(config.name).members)
        except StoreError as error:
            raise StoreNotUsable(f"cannot use the etcd at {config.etcd} (--etcd): {error}") from error
        if not found.items:
            break
        names = ", ".join(key.rpartition("/")[2] for key in found.items)
        if not all(map(_died_here, found.items.values())) or time.monotonic() > ends_s:
            raise StoreNotUsable(
                f"the etcd at {config.etcd} already has members of cluster {config.name!r}: {names}; "
                "choose another --name, or wait until their leases have run out"
            )
        if not said:
            report(f"waiting for the leases of {names}, which died here")
            said = True
        await asyncio.sleep(PROBE_S)
    # Nobody is left who wrote it, and what it says would be taken for news.
    await store.delete(Keys(config.name).status_attention)


def _died_here(kv: KeyValue) -> bool:
    try:
        member = Member.decode(kv)
    except ValueError:
        return False
    return member.host == socket.gethostname() and not processes.runs(member.pid)


async def _changed_or_soon(members: Members) -> None:
    try:
        async with asyncio.timeout(PROBE_S):
            await members.changed()
    except TimeoutError:
        pass
