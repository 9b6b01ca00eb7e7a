"""What only the leader does: run the nodes, reconcile, autoscale, write events. One run per term."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from flume_common.autoscale import Settings
from flume_common.election import Candidate, Deposed, Fenced, Term
from flume_common.etcd_flags import etcd_arguments
from flume_common.incarnation import Incarnation
from flume_common.keys import Keys
from flume_common.membership import Members
from flume_common.store import Store, StoreError
from flume_common.tasks import background

from flume_controller import happenings
from flume_controller.autoscaler import Autoscaler
from flume_controller.config import STANDARD_COMMAND, ControllerConfig
from flume_controller.disk_space import full_disk
from flume_controller.event_writer import EventWriter, event_writer
from flume_controller.events import Correlator
from flume_controller.fleet import ActionsFailed, AttentionFleet, SpecMoved
from flume_controller.last_known import LastKnown
from flume_controller.node_failures import tell_node_failures
from flume_controller.nodes import GrpcNodes
from flume_controller.processes import RecordDir
from flume_controller.providers.base import Instance, Provider
from flume_controller.providers.local import RECORDS, local_provider, recorded
from flume_controller.reconcile import Reconciler, Result
from flume_controller.spec import AttentionSpec
from flume_controller.views import Report, Wish

KEY = "attention"
"""The one key of the work queue."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the leader looks at; it lives longer than any term."""

    store: Store
    keys: Keys
    members: Members
    wish: Wish
    report: Report
    nodes: GrpcNodes
    last_known: LastKnown


class LedProvider:
    """The provider's instances while we lead; else what a leader of this machine has written down."""

    def __init__(self, records: RecordDir) -> None:
        self._records = records
        self._current: Provider | None = None

    async def instances(self) -> Sequence[Instance]:
        return await self._current.instances() if self._current else recorded(self._records)

    @contextmanager
    def held(self, provider: Provider) -> Iterator[None]:
        self._current = provider
        try:
            yield
        finally:
            self._current = None


class Leader:
    """Leads whenever the candidate is elected."""

    def __init__(self, config: ControllerConfig, around: Surroundings, candidate: Candidate) -> None:
        self.provider = LedProvider(RecordDir(config.data_dir / RECORDS))
        self.reconciler: Reconciler | None = None  # of this term; None while another one leads
        self.settings: Callable[[], Settings] = lambda: autoscale_settings(config)
        """Asked for before each decision of the autoscaler."""
        self._config = config
        self._around = around
        self._candidate = candidate
        self._correlator = Correlator(config.node)

    async def lead(self, term: Term) -> None:
        """Until cancelled. Raises Deposed when etcd says that the term is over."""
        deposed = False
        try:
            await self._lead(Fenced(self._around.store, self._candidate, term))
        except* Deposed:
            deposed = True
        if deposed:
            raise Deposed(term.epoch)

    async def _lead(self, fenced: Fenced) -> NoReturn:
        config, store, keys = self._config, self._around.store, self._around.keys
        async with (
            local_provider(
                lambda node: attention_command(config, node),
                config.data_dir,
                grace_s=config.stop_grace_s,
                zygote=config.zygote and config.attention_command == STANDARD_COMMAND,
                device=attention_device(config),
                num_standbys=config.standby,
            ) as provider,
            event_writer(store, fenced, keys, self._correlator) as events,
        ):
            fleet = self._fleet(fenced, provider, events)
            self.reconciler = self._reconciler(fleet)
            events.tell(happenings.of_election(config.node, fenced.term.epoch))
            poke = self.reconciler.poke
            try:
                with self.provider.held(provider):
                    async with background(
                        reconcile=self.reconciler.run(),
                        ready_to_start=provider.keep_ready(),
                        autoscale=self._autoscaler(fenced, fleet, events).run(),
                        node_failures=tell_node_failures(self._around.members, events.tell),
                        wake_on_members=_forward(self._around.members.changed, poke),
                        wake_on_spec=_forward(self._around.wish.changed, poke),
                        wake_on_status=_when_lost(self._around.report, poke),
                        wake_on_incarnation=_after(self._around.last_known.incarnation, poke),
                        wake_on_process=_forward(provider.changed, poke),
                    ):
                        await asyncio.get_running_loop().create_future()
            finally:
                self.reconciler = None
        raise AssertionError("the future above never completes")

    def _fleet(self, fenced: Fenced, provider: Provider, events: EventWriter) -> AttentionFleet:
        config, around = self._config, self._around
        return AttentionFleet(
            around.store,
            around.keys,
            fenced,
            provider,
            around.nodes,
            initial_spec(config),
            leader=config.node,
            tell=events.tell,
            progress_deadline_s=config.progress_deadline_s,
            preferred_ids=config.preferred_ids,
            disk_full=lambda: full_disk(config.data_dir),
            last_known=around.last_known,
        )

    def _autoscaler(self, fenced: Fenced, fleet: AttentionFleet, events: EventWriter) -> Autoscaler:
        around = self._around
        return Autoscaler(
            around.store,
            around.keys,
            fenced,
            around.members,
            around.nodes,
            lambda: self.settings(),
            prepare_s=lambda: fleet.prepare_s,
            unready=lambda: fleet.unready,
            tell=events.tell,
        )

    def _reconciler(self, fleet: AttentionFleet) -> Reconciler:
        async def reconcile(key: str) -> Result:
            return Result(await fleet.reconcile())

        return Reconciler(
            reconcile,
            (KEY,),
            expected=(StoreError, ActionsFailed, SpecMoved),
            stop_on=(Deposed,),
            resync_s=self._config.resync_s,
        )


def initial_spec(config: ControllerConfig) -> AttentionSpec:
    return AttentionSpec(desired=config.initial_attention, updated_at_s=time.time())


def autoscale_settings(config: ControllerConfig) -> Settings:
    """What the command line says; the rest as the policy's defaults."""
    return Settings(
        bandwidth_bytes_per_s=config.attention_bandwidth_bytes_per_s, rest_s=config.rest_of_step_s
    )


def attention_command(config: ControllerConfig, node: str) -> Sequence[str]:
    return (
        *config.attention_command,
        *("--cluster", config.cluster, "--node", node, "--listen", "127.0.0.1:0"),
        *etcd_arguments(config.store),
        *config.attention_args,
    )


def attention_device(config: ControllerConfig) -> str:
    """What attention nodes are told to run on, wherever in their arguments that is said."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    try:
        return str(parser.parse_known_args(config.attention_args)[0].device)
    except argparse.ArgumentError:
        return "cpu"  # the nodes say what is wrong with it


async def _when_lost(report: Report, poke: Callable[[], None]) -> NoReturn:
    """A status that others deleted or overwrote is written again. Our own writes need no look."""
    version = 0
    while True:
        version = await report.wait_newer(version)
        if report.status is None:
            poke()


async def _after(incarnation: Incarnation, poke: Callable[[], None]) -> NoReturn:
    ordinal = incarnation.ordinal
    while True:
        ordinal = await incarnation.wait_newer(ordinal)
        poke()


async def _forward(changed: Callable[[], Awaitable[None]], poke: Callable[[], None]) -> NoReturn:
    while True:
        await changed()
        poke()
