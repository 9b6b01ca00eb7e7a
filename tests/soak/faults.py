"""The faults, by name. Each is done while streams run; what to expect of them is the same for all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

import grpc
import hosts
import httpx
import processes
from flume_common.keys import Keys
from flume_common.membership import Role
from prometheus_client.parser import text_string_to_metric_families
from rounds import FAR, WEIGHTS, Fault, Round, group_of

PARTS = ("node", "engine", "supervisor")
"""Of a weight or attention node: both its processes, or one; in turn."""
BACK_S = 20.0
"""Until a node whose cable is in again is a member with its lanes."""
SLACK_S = 3.0
"""By which a deadline may be missed on a busy machine."""


@dataclass(frozen=True)
class Waits:
    """How long the faults that last, last."""

    stop_s: float = 20.0
    outage_s: float = 60.0
    cut_s: float = 20.0
    blink_s: float = 2.5
    """A cable that is soon back, before anybody has given up."""


def scale(round: Round) -> None:
    round.cluster.scale(4)
    round.late()
    round.cluster.scale(1)


def drain(round: Round) -> None:
    """In turn: until it is gone, and taken back."""
    node = round.rng.choice(round.cluster.in_use("attention")).id
    round.notes.append(node)
    round.cluster.flumectl("drain", node, "--timeout", "0")
    round.late()
    if round.number % 2 == 0:
        round.notes.append("taken back")
        round.cluster.flumectl("undrain", node)


def drain_by(deadline_s: float) -> Callable[[Round], None]:
    """Its ranges are moved, none is recomputed, and it is gone in time, well before their sequences end."""

    def fault(round: Round) -> None:
        node = round.rng.choice(round.cluster.in_use("attention")).id
        began_s = time.monotonic()
        round.cluster.flumectl("drain", node, "--deadline", f"{deadline_s:g}s", "--timeout", "0")
        round.late()
        round.cluster.until(lambda: node not in _ids(round), deadline_s + SLACK_S, f"{node} is gone")
        took_s = time.monotonic() - began_s
        running = sum(stream.is_alive() for _, stream in round.streams)
        moved = sum(_number(line["tokens"]) for line in round.logs.since("ranges_moved"))
        round.notes.append(
            f"{node} gone after {took_s:.1f} s, {moved} tokens moved, {running} streams ran on"
        )
        assert running, "every stream ended before it was gone: nothing was shown"

    return fault


def _ids(round: Round) -> set[str]:
    return {node.id for node in round.cluster.nodes("attention")}


def nothing_lost(round: Round) -> list[str]:
    """No node went while it held tokens."""
    lost = [line for line in round.logs.since("lane_lost") if line["lost_tokens"]]
    return [
        f"{line['node']} lost {line['lost_tokens']} tokens with {line['attention_node']}" for line in lost
    ]


def lost_recomputed(round: Round) -> list[str]:
    """No more was computed again than was lost."""
    lost = sum(_number(line["lost_tokens"]) for line in round.logs.since("lane_lost"))
    again = sum(_recomputed(round, "node_lost"))
    round.notes.append(f"{again} of {lost} lost tokens computed again")
    return [f"{again} tokens computed again, {lost} were lost"] if again > lost else []


def taken_over(round: Round) -> list[str]:
    """What the attention nodes kept; how much of it had to be computed again is only noted."""
    kept = sum(_number(line["adopted_tokens"]) for line in round.logs.since("sequence_adopted"))
    again = sum(_recomputed(round, "weight_node_lost"))
    round.notes.append(f"{kept} tokens taken over, {again} computed again")
    return []


def taken_over_whole(round: Round) -> list[str]:
    """No sequence, all of which were decoding, lost more than its last step, thus one token."""
    worst = max(_recomputed(round, "weight_node_lost"), default=0)
    more = [f"a sequence computed {worst} tokens again"] if worst > 1 else []
    return taken_over(round) + more


def _recomputed(round: Round, cause: str) -> list[int]:
    """Tokens of each recovery."""
    lines = round.logs.since("recovery_done")
    return [_number(line["recomputed_tokens"]) for line in lines if line["cause"] == cause]


def _number(value: object) -> int:
    return int(str(value))


def kill(role: str) -> Callable[[Round], None]:
    def fault(round: Round) -> None:
        for pid in _targets(round, role):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        round.late()

    return fault


def stop(role: str, seconds: float) -> Callable[[Round], None]:
    def fault(round: Round) -> None:
        pids = _targets(round, role)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            round.late()
            time.sleep(seconds)
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    return fault


def _targets(round: Round, role: str) -> list[int]:
    """Processes of a node that streams go through; says which."""
    node = round.rng.choice(round.cluster.in_use(role))
    group = group_of(node.pid)
    part = PARTS[round.number % len(PARTS)] if len(group) > 1 else "process"
    round.notes.append(f"{part} of {node.id}")
    return [item.pid for item in group if part in ("node", "process") or part in item.kind]


def cut(seconds: float, blink_s: float) -> Callable[[Round], None]:
    """In turn: for longer than a lease lasts, and for less than anything waits."""

    def fault(round: Round) -> None:
        there = round.world.there
        assert there is not None
        round.cluster.until(lambda: FAR in _in_routes(round), 10, f"a stream goes through {FAR}")
        epoch, long = _epoch(round), round.number % 2 == 1
        there.cut()
        try:
            cut_s = time.time()
            round.late()
            time.sleep(seconds if long else blink_s)
        finally:
            there.mend()
        _back(round, epoch if long else 0)
        _takes_tails(round)
        lost = [
            f"lost after {_at_s(line) - cut_s:.1f} s by {line['node']} ({line['reason']})"
            for line in round.logs.since("lane_lost")
            if line["attention_node"] == FAR
        ]
        round.notes += [f"cut for {seconds if long else blink_s:g} s", *lost]

    return fault


def _back(round: Round, old_epoch: int) -> None:
    """It is a member again, under a newer epoch than `old_epoch`, and has all its lanes."""
    began_s = time.monotonic()
    round.cluster.until(lambda: _epoch(round) > old_epoch, BACK_S, f"{FAR} is registered again")
    round.cluster.until(lambda: len(_lanes(round)) == WEIGHTS, BACK_S, f"{FAR} is attached again")
    round.notes.append(f"back {time.monotonic() - began_s:.1f} s after the cable")


def _takes_tails(round: Round, tries: int = 8) -> None:
    """New streams soon go through it."""
    for _ in range(tries):
        steps = sum(_lanes(round))
        round.fresh()
        if sum(_lanes(round)) > steps:
            return
    raise AssertionError(f"{FAR} was given none of {tries} streams")


def _epoch(round: Round) -> int:
    """0 while it is no member."""
    member = Keys("default").member(Role.ATTENTION, FAR)
    item = round.world.etcds.items(member).get(member)
    return item.create_revision if item else 0


def _lanes(round: Round) -> list[int]:
    """Steps it has answered on each lane it has now; none when it does not answer."""
    with suppress(grpc.RpcError):
        return [lane.steps for stats in round.cluster.stats(FAR) for lane in stats.lanes]
    return []


def _in_routes(round: Round) -> set[str]:
    return {item.node for route in round.cluster.routes() for item in route.ranges}


def _at_s(line: dict[str, object]) -> float:
    return datetime.fromisoformat(str(line["timestamp"])).timestamp()


def etcd_leader(round: Round, times: int = 3, every_s: float = 4.0) -> None:
    etcds = round.world.etcds
    for _ in range(times):
        began_s = time.monotonic()
        leader = etcds.leader()
        round.notes.append(leader.name)
        leader.kill()
        round.late()
        time.sleep(1.0)
        etcds.start()
        time.sleep(max(0.0, began_s + every_s - time.monotonic()))


def etcd_outage(seconds: float, ask_every_s: float = 10.0) -> Callable[[Round], None]:
    def fault(round: Round) -> None:
        before, pages = _ours(), _pages(round)
        round.world.etcds.kill()
        ends_s = time.monotonic() + seconds
        try:
            round.cluster.until(lambda: not round.cluster.status().store_connected, 15, "status says so")
            round.cluster.until(lambda: not any(_connected(pages)), 15, "metrics of every process say so")
            while time.monotonic() < ends_s:
                asked_s = time.monotonic()
                round.fresh()
                time.sleep(max(0.0, min(asked_s + ask_every_s, ends_s) - time.monotonic()))
            assert not any(_connected(pages)), "a process says that etcd answers"
        finally:
            round.world.etcds.start()
        round.cluster.until(lambda: all(_connected(pages)), 30, "metrics say that etcd is back")
        round.notes.append(f"{len(pages)} processes said so")
        assert _ours() == before, f"processes came or went: {_ours() ^ before}"

    return fault


def _pages(round: Round) -> list[str]:
    """The metrics of every member, of which we learn from etcd."""
    nodes = round.cluster.nodes()
    without = [node.id for node in nodes if not node.metrics_address]
    assert not without, f"no metrics of {without}"
    return [f"http://{node.metrics_address}/metrics" for node in nodes]


def _connected(pages: list[str]) -> list[bool]:
    """Whether etcd answers, as each of them says."""
    return [_metric(page, "flume_store_connected") == 1 for page in pages]


def _metric(page: str, name: str) -> float:
    families = text_string_to_metric_families(httpx.get(page, timeout=5).text)
    return next(family.samples[0].value for family in families if family.name == name)


def _ours() -> set[tuple[str, int]]:
    return {(item.name, item.pid) for item in processes.everything() if item.kind != "etcd"}


def table(waits: Waits) -> dict[str, Fault]:
    roles = ("attention", "weight", "controller", "router")
    parts = dict.fromkeys(roles[:2], " (node, engine, supervisor in turn)")
    checks = dict.fromkeys(roles, nothing_lost) | {"attention": lost_recomputed, "weight": taken_over}
    faults = [
        Fault("scale", scale, "1 -> 4 -> 1 attention nodes", nothing_lost, attention=1),
        Fault("drain", drain, "an attention node drained; every other time taken back", nothing_lost),
        Fault("drain-deadline", drain_by(5.0), "drained with a deadline of 5 s: its ranges move",
              nothing_lost),
        *(
            # Nothing can bring a connection back: the client asks again.
            Fault(f"kill-{role}", kill(role), "kill -9" + parts.get(role, ""),
                  taken_over_whole if role == "weight" else checks[role],
                  client="http" if role == "router" else "grpc")
            for role in roles
        ),
        Fault("etcd-leader", etcd_leader, "etcd's leader killed every 4 s, three times", nothing_lost),
        *(
            Fault(f"stop-{role}", stop(role, waits.stop_s),
                  f"SIGSTOP for {waits.stop_s:g} s" + parts.get(role, ""), checks[role])
            for role in roles
        ),
        Fault("etcd-outage", etcd_outage(waits.outage_s), f"all of etcd gone for {waits.outage_s:g} s",
              nothing_lost),
    ]  # fmt: skip
    if not hosts.why_not():
        faults.append(
            Fault("cut-attention", cut(waits.cut_s, waits.blink_s),
                  f"cable out of an attention node's host for {waits.cut_s:g} s, {waits.blink_s:g} s in turn",
                  lost_recomputed, far=True)
        )  # fmt: skip
    return {fault.name: fault for fault in faults}
