"""What may be left when no request runs: nothing. Asked of the nodes, of etcd and of the kernel."""

from __future__ import annotations

import time
from collections import Counter

import processes
from clusters import Cluster
from etcd_members import Etcds, Lease
from flume_common.keys import Keys
from flume_protos.v1 import attention_pb2

KEYS = Keys("default")
LEASE_S = 25.0
"""A lease that nobody renews is gone by then: the longest, of an election, is 15 s, and a new leader of
etcd starts its time anew."""
EVENTS_S = 600
"""Only the leases of events are granted for longer than that: an hour, and nobody renews them."""


class Leaks:
    """`found` says what is left now; some of that goes by itself within seconds."""

    def __init__(self, cluster: Cluster, etcds: Etcds, weights: int) -> None:
        self._cluster = cluster
        self._etcds = etcds
        self._weights = weights
        self._idle_leases: dict[int, float] = {}

    def found(self, attention: int, *, leases_ended: bool = False) -> list[str]:
        """What should not be, with so many attention nodes; with `leases_ended` also of leases without a
        key, which are left where a process was killed, until their time is over."""
        nodes = self._nodes(attention)
        return nodes or [
            *self._ranges(),
            *self._store(attention, leases_ended),
            *self._processes(attention),
        ]

    def _nodes(self, attention: int) -> list[str]:
        if self._cluster.settled() and len(self._cluster.nodes("attention")) == attention:
            return []
        states = [f"{node.id} {node.state}" for node in self._cluster.nodes()]
        return [f"not settled at {attention} attention nodes: {', '.join(states)}"]

    def _ranges(self) -> list[str]:
        weights = sorted(node.id for node in self._cluster.nodes("weight"))
        found = [f"request {item.id} {item.state}" for item in self._cluster.requests()]
        for stats in self._cluster.stats():
            found += _held(stats)
            lanes = sorted(lane.weight_node for lane in stats.lanes)
            if lanes != weights:
                found.append(f"{stats.node}: lanes of {lanes}, weight nodes {weights}")
        return found

    def _store(self, attention: int, leases_ended: bool) -> list[str]:
        found = [f"route {key}" for key in self._etcds.items(KEYS.routes)]
        members = Counter(key.split("/")[-2] for key in self._etcds.items(KEYS.members))
        wanted = Counter(attention=attention, weight=self._weights, router=1, controller=1)
        if members != wanted:
            found.append(f"members {dict(members)}, expected {dict(wanted)}")
        leases = self._etcds.leases()
        leases = [lease for lease in leases if lease.granted_s < EVENTS_S]
        held = Counter(_kind(lease.keys[0]) for lease in leases if lease.keys)
        wanted = Counter(members=sum(wanted.values()), election=1)
        if held != wanted:
            found.append(f"leases {dict(held)}, expected {dict(wanted)}")
        return found + self._idle(leases, leases_ended)

    def _idle(self, leases: list[Lease], ended: bool) -> list[str]:
        """Leases without a key that somebody renews, as they live longer than they could."""
        now_s = time.monotonic()
        idle = [lease.id for lease in leases if not lease.keys]
        self._idle_leases = {lease: self._idle_leases.get(lease, now_s) for lease in idle}
        return [
            f"lease {lease:x} without a key for {now_s - since_s:.0f} s"
            for lease, since_s in self._idle_leases.items()
            if ended or now_s - since_s > LEASE_S
        ]

    def _processes(self, attention: int) -> list[str]:
        seen = processes.counts(processes.everything())
        wanted = processes.expected(attention, self._weights)
        extra, missing = seen - wanted, wanted - seen
        return [f"processes: {dict(extra)} too many, {dict(missing)} missing"] if extra or missing else []


def _held(stats: attention_pb2.StatsReply) -> list[str]:
    found = []
    if stats.used_blocks or stats.used_tokens or stats.orphan_tokens:
        found.append(
            f"{stats.node}: {stats.used_blocks} blocks, {stats.used_tokens} tokens, "
            f"{stats.orphan_tokens} orphaned"
        )
    for lane in stats.lanes:
        if lane.sequences or lane.ranges or lane.held_blocks or lane.granted_blocks:
            found.append(
                f"{stats.node}, lane of {lane.weight_node}: {lane.sequences} sequences, {lane.ranges} ranges"
                f", {lane.held_blocks} of {lane.granted_blocks} granted blocks held"
            )
    return found


def _kind(key: str) -> str:
    """members or election."""
    return key.removeprefix(KEYS.root).split("/")[0]
