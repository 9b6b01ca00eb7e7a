"""Faults, many times over, against real processes and three real etcds, with the counts printed.

Each round runs greedy float32 streams on a running cluster, does the fault while they run, begins another
stream then, and holds every token against an undisturbed run. Afterwards nothing may be left: no KV block,
range, route, request, lane, lease or process; nor may long-lived processes grow from round to round. A round
that failed says all that is needed to find out why and keeps the cluster's files; the next one gets a new
cluster.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "e2e"))
import faults
import load
import processes
from clusters import running
from etcd_members import three_etcds
from hosts import Host, host, why_not
from leaks import LEASE_S
from memory import LEAST_SAMPLES, Growth, Memory
from report import failure_report
from rounds import ATTENTION, FAR, WEIGHTS, Fault, Pieces, Round, World

CLEAN_S = 40.0
"""Until nothing is left and every node is back; an election alone may take 15 s."""
SCALING = "scaling"
END = "at the end"
"""Of a cluster: what was left then, or after `flumectl down`."""

EXAMPLES = f"""
examples:
  make soak                                        everything, 20 rounds each: two hours
  make soak ARGS='--only kill-weight stop-weight --rounds 5'
  make soak ARGS='--only etcd-outage --rounds 1 --outage-s 600'
  make soak ARGS='--only {SCALING} --minutes 10'   scaled every 15 s at 70 % load: failed requests and p99 ITL
  make soak ARGS='--json counts.json'              the counts for other programs, too
  make soak ARGS='--list'                          what there is

Most of that time is waiting, so two can run at once, each with a cluster of its own; {SCALING} only alone:
  make soak ARGS='--only stop-attention stop-weight stop-controller stop-router etcd-outage' &
  make soak ARGS='--skip stop-attention stop-weight stop-controller stop-router etcd-outage {SCALING}'
"""


@dataclass
class Tally:
    """What came of one fault."""

    failures: list[str] = field(default_factory=list)  # one a round, empty for none
    seconds: list[float] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return sum(map(bool, self.failures))

    @property
    def leaks(self) -> list[Growth]:
        return [growth for growth in self.growths if growth.is_leak]


class Soak:
    def __init__(self, args: argparse.Namespace, chosen: list[str]) -> None:
        self._args = args
        self._chosen = chosen
        self._faults = faults.table(waits(args))
        self._expected: dict[tuple, Pieces] = {}
        self._folders: list[Path] = []
        self.tallies: dict[str, Tally] = {}

    def run(self) -> None:
        """All rounds of all faults; a new cluster after each failure."""
        todo = [(name, number) for name in self._chosen for number in range(1, self._rounds(name) + 1)]
        todo.sort(key=lambda item: self._is_far(item[0]))
        while todo:
            before = todo
            try:
                with self._world(far=self._is_far(todo[0][0])) as world:
                    todo = self._until_failure(world, todo)
            except AssertionError as error:  # of `down`, unless nothing was done yet
                if todo is before:
                    raise
                self._failed_end(str(error))

    def _rounds(self, name: str) -> int:
        return 1 if name == SCALING else self._args.rounds

    def _is_far(self, name: str) -> bool:
        return name != SCALING and self._faults[name].far

    def _until_failure(self, world: World, todo: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """What is left to do, from a failure or a fault that wants another cluster on."""
        memory = Memory()
        for index, (name, number) in enumerate(todo):
            if self._is_far(name) != (world.there is not None):
                self._note_end(world)
                return todo[index:]
            if number == 1:
                memory = Memory()
            failure = self._one(world, name, number, memory)
            rest = todo[index + 1 :]
            if failure or not rest or rest[0][0] != name:
                self._close(name, memory)
            if failure:
                return rest
        self._note_end(world)
        return []

    def _one(self, world: World, name: str, number: int, memory: Memory) -> str:
        tally = self.tallies.setdefault(name, Tally())
        began_s, began = time.monotonic(), datetime.now(UTC)
        rng = random.Random(f"{self._args.seed}/{name}/{number}")
        note = ""
        try:
            if name == SCALING:
                failure, note = load.scaling(world, self._args.minutes * 60, rng)
            else:
                failure, note = one_round(world, self._faults[name], number, rng, memory)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        took_s = time.monotonic() - began_s
        tally.failures.append(failure)
        tally.seconds.append(took_s)
        tally.notes.append(note)
        verdict = "FAILED" if failure else "ok"
        print(f"{name} {number}/{self._rounds(name)}: {verdict} ({took_s:.1f} s; {note})", flush=True)
        if failure:
            kept = self._keep(name, number)
            print(failure_report(failure, world.cluster, self._folders[-1], began, kept), flush=True)
        return failure

    def _note_end(self, world: World) -> None:
        """A lease that nobody renews is gone a while after the last round."""
        left = world.clean(len(world.cluster.nodes("attention")), LEASE_S + 5, leases_ended=True)
        if left:
            self._failed_end("\n".join(left))

    def _failed_end(self, failure: str) -> None:
        print(f"{END}: FAILED: {failure}", flush=True)
        self.tallies.setdefault(END, Tally()).failures.append(failure)

    def _close(self, name: str, memory: Memory) -> None:
        """Judge the memory of a series of rounds on one cluster."""
        growths = memory.growths()
        self.tallies[name].growths += growths
        for growth in growths:
            if growth.is_leak:
                print(f"{name}: MEMORY GROWS: {growth}", flush=True)
        self.write()

    @contextmanager
    def _world(self, *, far: bool) -> Iterator[World]:
        with tempfile.TemporaryDirectory(prefix="flume-soak-") as folder:
            path = Path(folder)
            self._folders.append(path)
            with ExitStack() as stack:
                there = stack.enter_context(host()) if far else None
                etcds = stack.enter_context(three_etcds(path / "etcds", [there.gateway] if there else []))
                nodes = ("--attention", str(ATTENTION), "--weight", str(WEIGHTS))
                kind = ("--dtype", "float32", "--kv-memory", str(processes.KV_BYTES))
                where = ("--etcd", etcds.endpoints, *(("--node-host", there.gateway) if there else ()))
                ours = running(path / "cluster", *nodes, *kind, *where)
                world = World(stack.enter_context(ours), etcds, self._expected, there)
                if there is not None:
                    join_far(world, there)
                yield world
            assert not (left := processes.everything()), f"left after `flumectl down`: {left}"

    def _keep(self, name: str, number: int) -> Path:
        """Copy the cluster's files for whoever looks for the cause."""
        folder = self._args.keep / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}-{number}"
        ignore = shutil.ignore_patterns("member", "lock", "*.sock*")
        shutil.copytree(self._folders[-1], folder, ignore=ignore)
        return folder

    def write(self) -> None:
        """The counts so far, as JSON."""
        if self._args.json is None:
            return
        counts = {
            name: {
                "rounds": len(tally.failures),
                "failed": tally.failed,
                "seconds": [round(seconds, 1) for seconds in tally.seconds],
                "notes": tally.notes,
                "failures": list(filter(None, tally.failures)),
                "memory": [
                    {
                        "process": growth.name,
                        "rss_mib": [round(rss / processes.MIB, 1) for rss in growth.series],
                    }
                    for growth in tally.growths
                ],
                "memory_leaks": len(tally.leaks),
            }
            for name, tally in self.tallies.items()
        }
        self._args.json.write_text(json.dumps(counts, indent=2) + "\n")


def join_far(world: World, there: Host) -> None:
    """FAR joins; one of the controller's own is let go for it."""
    words = [
        *(sys.executable, "-m", "flume_attention", "--node", FAR, "--dtype", "float32"),
        *("--kv-memory", str(processes.KV_BYTES), "--listen", f"{there.address}:0"),
        *("--etcd", world.etcds.endpoints_at(there.gateway)),
    ]
    # Shared memory would go on working without the cable.
    there.start(words, world.cluster.data_dir / f"{FAR}.log", {"UCX_TLS": "tcp"})
    left = world.clean(ATTENTION, CLEAN_S)
    assert not left and FAR in {node.id for node in world.cluster.nodes("attention")}, left


def one_round(world: World, fault: Fault, number: int, rng: random.Random, memory: Memory) -> tuple[str, str]:
    """What went wrong, empty when nothing did, and a note on what was done."""
    if len(world.cluster.nodes("attention")) != fault.attention:
        world.cluster.scale(fault.attention, "--wait-drained")
    world.learn(fault.client)
    this = Round(world, number, rng, fault.client)
    this.begin()
    fault.act(this)
    failures = [*this.wrong(), *fault.check(this)]
    ended_s = time.monotonic()
    failures += world.clean(fault.attention, CLEAN_S)
    this.notes += [
        f"longest gap {this.longest_gap_s:.1f} s",
        f"clean after {time.monotonic() - ended_s:.1f} s",
    ]
    memory.sample([item for item in processes.everything() if item.kind != "etcd"])  # its history grows
    return "\n".join(failures), ", ".join(this.notes)


def print_table(tallies: dict[str, Tally]) -> None:
    print(f"\n{'fault':<18}{'rounds':>8}{'failed':>8}{'grows':>8}{'seconds a round':>18}")
    for name, tally in tallies.items():
        mean_s = sum(tally.seconds) / len(tally.seconds) if tally.seconds else 0.0
        print(f"{name:<18}{len(tally.failures):>8}{tally.failed:>8}{len(tally.leaks):>8}{mean_s:>18.1f}")
    print(f"\nmemory, where a process lived for {LEAST_SAMPLES} rounds or more; most grown first")
    for name, tally in tallies.items():
        for growth in tally.growths[:4]:
            print(f"  {name:<16} {growth}")


def parse(names: list[str]) -> argparse.Namespace:
    flags = argparse.ArgumentParser(
        prog="make soak", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    flags.add_argument("--rounds", type=int, default=20, help="of each fault (default: %(default)s)")
    flags.add_argument("--only", nargs="+", choices=names, metavar="FAULT", help="these; by default all")
    flags.add_argument("--skip", nargs="+", choices=names, metavar="FAULT", default=[], help="all but these")
    flags.add_argument(
        "--stop-s", type=float, default=20.0, help="how long SIGSTOP lasts (default: %(default)s)"
    )
    flags.add_argument(
        "--outage-s", type=float, default=60.0, help="how long etcd is gone (default: %(default)s)"
    )
    flags.add_argument(
        "--cut-s", type=float, default=20.0, help="how long a cable is out (default: %(default)s)"
    )
    flags.add_argument("--minutes", type=float, default=10.0, help=f"of {SCALING} (default: %(default)s)")
    flags.add_argument("--seed", default="1", help="of what is left to chance (default: %(default)s)")
    flags.add_argument("--json", type=Path, metavar="FILE", help="write the counts there, too")
    flags.add_argument(
        "--keep", type=Path, metavar="DIR", default=Path(tempfile.gettempdir()) / "flume-soak-failures",
        help="where the files of failed rounds go (default: %(default)s)",
    )  # fmt: skip
    flags.add_argument("--list", action="store_true", help="say what each fault is, and do nothing")
    return flags.parse_args()


def waits(args: argparse.Namespace) -> faults.Waits:
    return faults.Waits(stop_s=args.stop_s, outage_s=args.outage_s, cut_s=args.cut_s)


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what we began is ended
    table = faults.table(faults.Waits())
    args = parse([*table, SCALING])
    if args.list:
        for fault in faults.table(waits(args)).values():
            print(f"{fault.name:<16} {fault.about}")
        if why := why_not():
            print(f"{'cut-attention':<16} not here: {why}")
        print(f"{SCALING:<16} scaled every {load.EVERY_S:g} s at 70 % load, for {args.minutes:g} minutes")
        return 0
    processes.adopt_orphans()
    soak = Soak(args, [name for name in args.only or [*table, SCALING] if name not in args.skip])
    try:
        soak.run()
    except KeyboardInterrupt:
        print("interrupted")
    soak.write()
    print_table(soak.tallies)
    return int(any(tally.failed or tally.leaks for tally in soak.tallies.values()))


if __name__ == "__main__":
    raise SystemExit(main())
