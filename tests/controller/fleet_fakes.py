"""What surrounds a fleet in tests: processes, nodes and an etcd that are only values."""

from __future__ import annotations

import itertools
from dataclasses import replace

from flume_common.store import Compare, Delete, Get, KeyValue, Put, Snapshot, TxnResult
from flume_controller.providers.base import Instance


class FakeProvider:
    """Processes that run because the list says so."""

    def __init__(self, clock):
        self.clock = clock
        self.known = {}
        self.pids = itertools.count(1)
        self.stopped = []
        self.before_listing = None
        self.error = None

    async def instances(self):
        if self.before_listing:
            await self.before_listing()
        return list(self.known.values())

    async def start(self, node):
        if self.error:
            raise self.error
        self.known[node] = Instance(node, pid=next(self.pids), started_at_s=self.clock())

    async def stop(self, node):
        self.stopped.append(node)
        self.known[node] = replace(self.known[node], stopping=True)

    async def forget(self, node):
        del self.known[node]

    def crash(self, node):
        self.known[node] = replace(self.known[node], running=False, exit_code=1)


class FakeNodes:
    """Node calls: `holds` is what nodes answer, `weights` what weight nodes do; drains are recorded."""

    def __init__(self):
        self.holds = {}
        self.calls = []
        self.error = None
        self.weights = {}

    async def answers(self, weights):
        return {m.id: self.weights[m.id] for m in weights if m.id in self.weights}

    async def held(self, members):
        return {m.id: self.holds[m.id] for m in members if m.id in self.holds}

    async def drain(self, member, deadline_s=0.0):
        if self.error:
            raise self.error
        self.calls.append(("drain", member.id, round(deadline_s)) if deadline_s else ("drain", member.id))

    async def undrain(self, member):
        self.calls.append(("undrain", member.id))


class Died(Exception):
    """The process was killed."""


class Fuse:
    """Kills whoever does the step that it was set to, before or after the step."""

    def __init__(self):
        self.left = None
        self.after = False

    async def step(self, work):
        if self.left is None:
            return await work
        self.left -= 1
        if self.left >= 0:
            return await work
        if self.after:
            await work
        else:
            work.close()
        raise Died


class FakeStore:
    """The part of etcd's rules that a pass relies on: revisions and transactions. Nothing in it waits."""

    def __init__(self):
        self.revision = 1
        self.items = {}
        self.fuse = Fuse()

    async def get(self, key):
        return self.items.get(key)

    async def range(self, prefix):
        return Snapshot(self.revision, {key: kv for key, kv in self.items.items() if key.startswith(prefix)})

    async def put(self, key, value, lease=0):
        await self.txn([], [Put(key, value, lease)])

    async def delete(self, key):
        await self.txn([], [Delete(key)])

    async def txn(self, compares, success, failure=()):
        return await self.fuse.step(self._txn(compares, success, failure))

    async def _txn(self, compares, success, failure):
        holds = all(self._holds(compare) for compare in compares)
        ops = success if holds else failure
        self.revision += any(not isinstance(op, Get) for op in ops)
        return TxnResult(holds, self.revision, tuple(self._do(op) for op in ops))

    def _holds(self, compare: Compare):
        kv = self.items.get(compare.key)
        assert compare.relation == "==" and compare.target in ("create_revision", "mod_revision"), compare
        return (getattr(kv, compare.target) if kv else 0) == compare.operand

    def _do(self, op):
        before = self.items.get(op.key)
        match op:
            case Get():
                return before
            case Delete():
                self.items.pop(op.key, None)
                return int(before is not None)
            case Put(key, value, lease):
                created = before.create_revision if before else self.revision
                version = before.version + 1 if before else 1
                self.items[key] = KeyValue(key, value, created, self.revision, version, lease)
        return None
