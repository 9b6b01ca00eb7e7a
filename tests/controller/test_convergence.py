"""Whatever happens in whatever order, the fleet ends as wished and no pass does harm on the way.

The real passes over an etcd, processes and nodes that are values: edits of the spec, deaths, lapsed and
renewed registrations, restarts of the controller, and passes that come late, twice or not at all.
"""

import asyncio
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from flume_common.keys import Keys
from flume_common.membership import Member, Role, State
from flume_controller import desired
from flume_controller.fleet import AttentionFleet
from flume_controller.leaving import SKEW_S
from flume_controller.observe import Held, Patience
from flume_controller.spec import Actor, AttentionSpec, decode_spec, decode_status
from flume_controller.spec_admin import drained
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

sys.path.insert(0, str(Path(__file__).parent))
from fleet_fakes import Died, FakeNodes, FakeProvider, FakeStore
from history import Entry, violations
from office import Office

KEYS = Keys("property")
PICK = st.integers(0, 7)
DEADLINES = st.sampled_from([0.0, 0.0, 5.0, 30.0])
WAKES = st.integers(0, 2)  # a wake-up that is lost, heard, or heard twice


LOOP = asyncio.new_event_loop()


@pytest.fixture(autouse=True, scope="module")
def close_the_loop():
    yield
    LOOP.close()


def now(coroutine):
    """The result of a coroutine that waits for nothing outside of itself."""
    return LOOP.run_until_complete(coroutine)


class Provider(FakeProvider):
    """Whoever starts or stops a process may be killed there."""

    def __init__(self, world):
        super().__init__(lambda: world.now_s)
        self.world = world
        self.fuse = world.store.fuse

    async def start(self, node):
        await self.fuse.step(super().start(node))

    async def stop(self, node):
        self.world.check_stop(node)
        await self.fuse.step(super().stop(node))


class Nodes(FakeNodes):
    """Draining shows in the member's record at once."""

    def __init__(self, world):
        super().__init__()
        self.world = world

    async def held(self, members):
        return {m.id: Held(0, 0, m.state is State.DRAINING) for m in members if m.id in self.world.empty}

    async def drain(self, member, deadline_s=0.0):
        leave_by_s = self.world.now_s + deadline_s if deadline_s else 0.0
        await self.world.registered(member.id, State.DRAINING, leave_by_s)

    async def undrain(self, member):
        await self.world.registered(member.id, State.READY)


class FleetLife(RuleBasedStateMachine):
    @initialize(wanted=st.integers(0, 4))
    def begin(self, wanted):
        self.now_s = 1000.0
        self.store = FakeStore()
        self.provider = Provider(self)
        self.nodes = Nodes(self)
        self.empty = set()  # nodes that hold nothing and say so
        self.initial = AttentionSpec(desired=wanted)
        self.history = []
        self.restart()

    def restart(self):
        office = now(Office.take(self.store, KEYS))
        self.fleet = AttentionFleet(
            self.store, KEYS, office.fenced, self.provider, self.nodes, self.initial, leader="controller-1",
            patience=Patience(start_s=100, lost_s=30), progress_deadline_s=1e9, clock=lambda: self.now_s,
        )  # fmt: skip

    def register(self, node, state):
        now(self.registered(node, state))

    async def registered(self, node, state, leave_by_s=0.0):
        member = Member(
            id=node, role=Role.ATTENTION, state=state, address="x:1", host="here", pid=1, version="0",
            protocol_version=1, started_at_s=0, leave_by_s=leave_by_s,
        )  # fmt: skip
        await self.store.put(KEYS.member(Role.ATTENTION, node), member.encode())

    def members(self):
        found = (kv for key, kv in self.store.items.items() if key.startswith(KEYS.members))
        return {member.id: member for member in map(Member.decode, found)}

    def staying(self):
        """Running and not on their way out, registered or not."""
        members = self.members()
        return {
            id
            for id, item in self.provider.known.items()
            if item.running and not item.stopping
            and not (id in members and members[id].state is State.DRAINING)
        }  # fmt: skip

    def ready(self):
        return {id for id in self.staying() if self.members().get(id)}

    def spec(self):
        kv = self.store.items.get(KEYS.spec_attention)
        return decode_spec(kv.value) if kv else self.initial

    # What people and the world do.

    @rule(wanted=st.integers(0, 4), deadline_s=DEADLINES, wakes=WAKES)
    def somebody_scales(self, wanted, deadline_s, wakes):
        self.edit(
            lambda spec: desired.changed(
                spec, wanted, actor=Actor.USER, current=None, deadline_s=deadline_s, now_s=self.now_s
            )
        )
        self.wake(wakes)

    @rule(pick=PICK, deadline_s=DEADLINES, wakes=WAKES)
    def somebody_drains_a_node(self, pick, deadline_s, wakes):
        if node := self.some(pick, self.staying()):
            self.edit(lambda spec: drained(spec, node, deadline_s=deadline_s, now_s=self.now_s))
        self.wake(wakes)

    def edit(self, change):
        now(desired.edit(self.store, KEYS, change))
        self.record()

    @rule(seconds=st.sampled_from([0.1, 1.0, 20.0, 40.0, 120.0]))
    def time_passes(self, seconds):
        self.now_s += seconds

    def some(self, pick, candidates):
        ordered = sorted(candidates)
        return ordered[pick % len(ordered)] if ordered else None

    def wake(self, times):
        for _ in range(times):
            self.a_pass()

    @rule(pick=PICK, wakes=WAKES)
    def a_process_registers(self, pick, wakes):
        if node := self.some(pick, self.staying() - self.members().keys()):
            self.register(node, State.READY)
        self.wake(wakes)

    @rule(pick=PICK, wakes=WAKES)
    def a_process_dies(self, pick, wakes):
        if node := self.some(pick, {id for id, item in self.provider.known.items() if item.running}):
            self.provider.crash(node)
        self.wake(wakes)

    @rule(pick=PICK, wakes=WAKES)
    def a_registration_lapses(self, pick, wakes):
        if node := self.some(pick, self.members()):
            now(self.store.delete(KEYS.member(Role.ATTENTION, node)))
        self.wake(wakes)

    @rule(pick=PICK, wakes=WAKES)
    def a_node_becomes_empty(self, pick, wakes):
        if node := self.some(pick, self.members()):
            self.empty.add(node)
        self.wake(wakes)

    @rule()
    def the_controller_is_restarted(self):
        self.restart()

    @precondition(lambda self: self.provider.known)
    @rule()
    def what_was_told_to_end_ends(self):
        for id, item in self.provider.known.items():
            if item.stopping:
                self.provider.known[id] = replace(item, running=False)
                now(self.store.delete(KEYS.member(Role.ATTENTION, id)))

    # What the controller does.

    @rule(steps=st.integers(0, 6), after=st.booleans())
    def the_controller_is_killed_in_a_pass(self, steps, after):
        """Before or after any of its writes, starts, stops and drains."""
        self.store.fuse.left, self.store.fuse.after = steps, after
        try:
            with suppress(Died):
                self.a_pass()
        finally:
            self.store.fuse.left = None
        self.restart()

    @rule()
    def a_pass(self):
        wanted, drained = self.spec().desired, set(self.spec().drained)
        ready, staying = self.ready() - drained, self.staying() - drained
        unregistered = staying - self.members().keys()
        try:
            now(self.fleet.reconcile())
        finally:
            self.record()
            self.check(wanted, ready, staying, unregistered, drained)

    def check_stop(self, node):
        member = self.members().get(node)
        if member is None or node in self.empty:
            return
        assert member.state is State.DRAINING and 0 < member.leave_by_s <= self.now_s + SKEW_S
        assert self.ready() - {node}, "somebody is left to compute what is lost"

    def check(self, wanted, ready, staying, unregistered, drained):
        still_ready = self.ready() - drained
        assert len(still_ready) >= min(wanted, len(ready)), "a pass never takes a ready node that is wanted"
        # The surge: what runs without a registration may be as good as lost, and is replaced.
        most = max(wanted, min(wanted, len(ready)) + len(unregistered))
        if self.store.fuse.left is not None:
            # A pass that dies half way may not have let go of anything yet.
            most = max(wanted + len(unregistered), len(staying))
        assert len(self.staying() - drained) <= most
        assert len(self.staying() - drained - staying) <= wanted, "it never starts more than are wanted"

    def record(self):
        for name, key, decode in (
            ("spec", KEYS.spec_attention, decode_spec),
            ("status", KEYS.status_attention, decode_status),
        ):
            kv = self.store.items.get(key)
            if kv and not any(e.revision == kv.mod_revision and e.kind == name for e in self.history):
                self.history.append(Entry(name, decode(kv.value), kv.mod_revision))

    def teardown(self):
        if not hasattr(self, "provider"):
            return
        for _ in range(30):
            self.what_was_told_to_end_ends()
            for node in self.members().keys() - {i.id for i in self.provider.known.values() if i.running}:
                now(self.store.delete(KEYS.member(Role.ATTENTION, node)))
            for node in self.staying() - self.members().keys():
                self.register(node, State.READY)
            self.empty = set(self.members())
            self.now_s += 31.0
            self.a_pass()
        wanted = self.spec().desired
        assert len(self.ready()) == wanted and len(self.provider.known) == wanted
        status = decode_status(self.store.items[KEYS.status_attention].value)
        assert (status.ready, status.observed_generation) == (wanted, self.spec().generation)
        assert {item.type: item.reason for item in status.conditions}["Progressing"] == "AsDesired"
        assert violations(sorted(self.history, key=lambda entry: entry.revision)) == []


FleetLife.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestFleetLife = FleetLife.TestCase
