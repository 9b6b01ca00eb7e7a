"""How soon an attention node is READY, by phase: an engine alone, a whole node, a standby.

    python bench/gpu_ready.py [--device cuda] [--kv-bytes 40GiB] [--rounds 5] [--out ready.json]

All are forked from a zygote, one after the other, each gone before the next. On a GPU READY means that all
memory for KV is the node's; on a CPU pages come with tokens.

engine     from asking the zygote until the engine is ready for lanes: `process` is the fork up to its first
           line, `device` the context, `first_kernel` what kernels and pinned memory take once, `port` the UCX
           worker, `told` until we know
node       with its supervisor, from the provider's start until etcd shows it READY
standby    from calling one that waits until etcd shows it READY

Whole nodes need this project installed and an etcd binary; where these are not they are left out, and said to
be. Times are milliseconds since the start, medians over the rounds; the first start is not counted. On a GPU
the exit code is 1 where a median is over its limit: 400 ms, 100 ms for a standby.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from flume_attention.memory import Memory, kv_bytes
from flume_attention.messages import CannotRun, FromEngine, Started
from flume_attention.supervisor import ENGINE_ENV, ENGINE_MODULE
from flume_common.engine_link import run_engine
from flume_common.etcd_binary import EtcdNotFound, embedded_etcd, find_etcd
from flume_common.keys import Keys
from flume_common.membership import Members, Role, State, watch_members
from flume_common.store import StoreConfig, connect
from flume_common.tasks import background
from flume_common.telemetry import configure_logging, version
from flume_common.zygote import abstract_name
from flume_controller.processes import RecordDir
from flume_controller.providers.local import RECORDS, LocalProvider, local_provider
from flume_controller.providers.zygote import Zygote
from flume_controller.supervise import kill_all

LIMITS_MS = {"engine": 400.0, "node": 400.0, "standby": 100.0}
WAIT_S = 60.0
ANY = Memory(1 << 60, 1 << 60)

Times = dict[str, float]  # phase -> ms after the start at which it was over


async def until(look: Callable[[], Any], what: str) -> Any:
    try:
        async with asyncio.timeout(WAIT_S):
            while not (got := look()):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise SystemExit(f"no {what} within {WAIT_S:g} s") from None
    return got


def log_lines(path: Path) -> Iterator[dict[str, Any]]:
    with suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            with suppress(ValueError):
                yield json.loads(line)


def said(path: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in log_lines(path) if line.get("event") == event]


@dataclass(frozen=True)
class Bench:
    folder: Path
    device: str
    kv_bytes: int
    rounds: int

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    async def zygote_ready(self) -> None:
        await until(lambda: len(said(self.logs / "zygote.log", "zygote_ready")) == 2, "zygote")

    async def repeat(self, once: Callable[[int], Awaitable[Times]]) -> list[Times]:
        return [await once(number) for number in range(self.rounds + 1)][1:]


async def engines(bench: Bench) -> list[Times]:
    records = RecordDir(bench.folder / RECORDS)
    Zygote(records, bench.logs, bench.device).ensure()
    await bench.zygote_ready()
    flags = ["--kv-bytes", str(bench.kv_bytes), "--device", bench.device]

    async def once(number: int) -> Times:
        began_s = time.monotonic()
        zygote = abstract_name("engines", records.path)
        async with run_engine(
            ENGINE_MODULE, flags, inbox=FromEngine, env=ENGINE_ENV, zygote=zygote
        ) as engine:
            started = await engine.receive()
            told_ms = 1e3 * (time.monotonic() - began_s)
        if isinstance(started, CannotRun):
            raise SystemExit(f"an engine cannot run: {started.reason}")
        return times_of(started, began_s, told_ms)

    return await bench.repeat(once)


def times_of(started: Started, began_s: float, told_ms: float) -> Times:
    """An engine's phases, which follow one another, as times since `began_s` (monotonic)."""
    took_ms = {"process": 1e3 * (started.main_at_s - began_s), **started.phases_ms}
    return {**dict(zip(took_ms, itertools.accumulate(took_ms.values()), strict=True)), "told": told_ms}


class Nodes:
    """Whole nodes, one at a time."""

    def __init__(self, bench: Bench, provider: LocalProvider, members: Members) -> None:
        self._bench, self._provider, self._members = bench, provider, members

    async def once(self, number: int) -> Times:
        node, began_s = f"attention-{number}", time.time()
        await self._provider.start(node)
        await until(lambda: self._state(node) is State.READY, f"READY {node}")
        ready_s = time.time()
        await self._end(node)
        return {**self._phases(node, began_s), "READY": 1e3 * (ready_s - began_s)}

    async def standby_once(self, number: int) -> Times:
        await until(lambda: self._waiting(), "standby")
        await asyncio.sleep(0.5)
        return await self.once(number)

    def _state(self, node: str) -> State | None:
        member = self._members.current.get((Role.ATTENTION, node))
        return member.state if member else None

    def _waiting(self) -> bool:
        paths = self._bench.logs.glob("standby-*.log")
        return any(said(path, "standby_ready") for path in paths)

    def _phases(self, node: str, began_s: float) -> Times:
        """What its log tells of this start; a standby's begins before."""
        times: Times = {}
        for line in log_lines(self._bench.logs / f"{node}.log"):
            at_ms = 1e3 * (datetime.fromisoformat(line["timestamp"]).timestamp() - began_s)
            if at_ms < 0:
                continue
            if line["event"] in ("called", "registered"):
                times[line["event"]] = at_ms
            elif line["event"] == "imported":
                times["imported"] = at_ms - line["measure_ms"]
                times["memory measured"] = at_ms
            elif line["event"] == "engine_started":
                times.update(engine_phases(line, at_ms))
        return times

    async def _end(self, node: str) -> None:
        await self._provider.stop(node)
        await until(lambda: self._state(node) is None, f"end of {node}")
        while any(instance.running for instance in await self._provider.instances()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await self._provider.forget(node)


def engine_phases(line: dict[str, Any], at_ms: float) -> Times:
    """Of the log line with which a supervisor hears of its engine. Its fields are in the order of phases."""
    took = {name.removesuffix("_ms"): ms for name, ms in line.items() if name.endswith("_ms")}
    at_ms -= took.pop("elapsed")
    times = {"engine: asked for": at_ms}
    for name, ms in took.items():
        at_ms += ms
        times[f"engine: {name}"] = at_ms
    return times


@asynccontextmanager
async def nodes(bench: Bench, standbys: int) -> AsyncIterator[Nodes]:
    keys = Keys("ready")
    async with embedded_etcd(bench.folder / "etcd", args=["--unsafe-no-fsync"]) as etcd:

        def command(node: str) -> list[str]:
            return [
                *(sys.executable, "-m", "flume_attention", "--cluster", keys.cluster, "--node", node),
                *("--etcd", etcd.endpoint, "--device", bench.device, "--kv-memory", str(bench.kv_bytes)),
            ]

        try:
            async with (
                connect(StoreConfig((etcd.endpoint,))) as store,
                watch_members(store, keys) as members,
                local_provider(
                    command, bench.folder, zygote=True, device=bench.device, num_standbys=standbys
                ) as provider,
                background(keep_ready=provider.keep_ready()),
            ):
                await bench.zygote_ready()
                yield Nodes(bench, provider, members)
        finally:
            kill_all(RecordDir(bench.folder / RECORDS))


async def whole_nodes(bench: Bench) -> list[Times]:
    async with nodes(bench, 0) as running:
        return await bench.repeat(running.once)


async def standbys(bench: Bench) -> list[Times]:
    async with nodes(bench, 1) as running:
        return await bench.repeat(running.standby_once)


MEASURES = {"engine": engines, "node": whole_nodes, "standby": standbys}


def measure(name: str, args: argparse.Namespace) -> list[Times]:
    with tempfile.TemporaryDirectory(prefix="gpu-ready-", ignore_cleanup_errors=True) as folder:
        bench = Bench(Path(folder), args.device, args.kv_bytes, args.rounds)
        try:
            return asyncio.run(MEASURES[name](bench))
        finally:
            kill_all(RecordDir(bench.folder / RECORDS))


def table(name: str, measured: list[Times]) -> list[str]:
    """Phases in order of their median, with the time since the one before."""
    names = {phase: None for times in measured for phase in times}
    medians = {phase: statistics.median(t[phase] for t in measured if phase in t) for phase in names}
    lines = [f"{name}, {len(measured)} rounds", f"  {'':<22}  at ms    took  worst at"]
    before_ms = 0.0
    for phase, at_ms in sorted(medians.items(), key=lambda item: item[1]):
        worst_ms = max(times[phase] for times in measured if phase in times)
        lines.append(f"  {phase:<22} {at_ms:6.0f}  {at_ms - before_ms:6.1f}  {worst_ms:8.0f}")
        before_ms = at_ms
    return lines


def ready_ms(measured: list[Times]) -> float:
    """The median of when all was over."""
    return statistics.median(max(times.values()) for times in measured)


def nodes_can_run() -> bool:
    try:
        find_etcd()
        version()
    except (EtcdNotFound, PackageNotFoundError) as error:
        print(f"whole nodes are left out: {error}\n", flush=True)
        return False
    return True


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--kv-bytes", type=lambda text: kv_bytes(text, ANY), default=40 << 30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--what", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--out", type=Path, help="where to write all rounds as JSON")
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    configure_logging("bench", "bench", "warning")
    found: dict[str, list[Times]] = {}
    over = False
    for name in args.what:
        if name != "engine" and not nodes_can_run():
            continue
        found[name] = measure(name, args)
        print("\n".join(table(name, found[name])))
        within = ready_ms(found[name]) <= LIMITS_MS[name]
        over = over or not within
        print(f"  {'within' if within else 'OVER'} {LIMITS_MS[name]:.0f} ms\n", flush=True)
    if args.out:
        how = {"device": args.device, "kv_bytes": args.kv_bytes, "limits_ms": LIMITS_MS}
        args.out.write_text(json.dumps({**how, "rounds": found}, indent=1))
    return 1 if over and args.device == "cuda" else 0


if __name__ == "__main__":
    sys.exit(main())
