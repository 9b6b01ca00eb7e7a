"""From `flumectl scale` to the first token stored on the new attention node, by phase, on this machine.

    python bench/scale_out.py [--standby 0 1] [--no-zygote] [--rounds 5] [--json FILE]

A real `flumectl up` with one attention node and two long answers being generated is scaled to two; what
happens when is read from etcd as it is written, from the logs, and from the new node itself. Then back to
one, and again. Times are milliseconds since the command was started, medians over the rounds; the command
itself, a Python program, is the first row. Every row is what had happened last before the next one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
from flume_common.etcd_binary import free_port
from flume_common.keys import Keys
from flume_common.route_store import decode_route
from flume_common.store import Store, StoreConfig, connect
from flume_common.store.watch import Removed
from flume_common.tasks import background
from flume_controller.spec import decode_spec
from flume_protos.v1 import attention_pb2, attention_pb2_grpc, weight_pb2, weight_pb2_grpc

FLUMECTL = (sys.executable, "-m", "flume_controller.flumectl")
NEW_NODE = "attention-2"
PROMPT_TOKENS, ANSWERS = 400, 2
LIMITS_MS = {"standby": 1000.0, "no standby": 3000.0}
ROUND_S = 60.0

Times = dict[str, float]  # phase -> Unix time at which it was over


class Cluster:
    """A running cluster and what is known of its files."""

    def __init__(self, folder: Path, ports: dict[str, int]) -> None:
        self.logs = folder / "default" / "logs"
        self.ports = ports

    def log(self, name: str) -> list[dict[str, Any]]:
        lines = []
        with suppress(FileNotFoundError):
            for line in (self.logs / f"{name}.log").read_text().splitlines():
                with suppress(ValueError):
                    lines.append(json.loads(line))
        return lines

    def when(self, name: str, event: str, after_s: float, **fields: Any) -> float | None:
        """When a log first said this after that moment."""
        for line in self.log(name):
            if line.get("event") == event and fields.items() <= line.items():
                at_s = datetime.fromisoformat(line["timestamp"]).timestamp()
                if at_s >= after_s:
                    return at_s
        return None

    async def flumectl(self, *words: str) -> None:
        process = await asyncio.create_subprocess_exec(
            *FLUMECTL, *words, "--server", f"127.0.0.1:{self.ports['admin']}", stdout=subprocess.DEVNULL
        )
        assert await process.wait() == 0, words


@contextmanager
def cluster(standbys: int, zygote: bool) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="scale-out-") as folder:
        ports = {name: free_port() for name in ("http", "admin", "etcd")}
        flags = [word for name, port in ports.items() for word in (f"--{name}-port", str(port))]
        up = [*FLUMECTL, "up", "--detach", "--data-dir", folder, *flags, "--kv-memory", "512MiB"]
        how = ["--standby", str(standbys), "--zygote" if zygote else "--no-zygote"]
        subprocess.run([*up, *how], check=True, stdout=subprocess.DEVNULL)
        try:
            yield Cluster(Path(folder), ports)
        finally:
            subprocess.run([*FLUMECTL, "down", "--data-dir", folder], check=True, stdout=subprocess.DEVNULL)


class Observer:
    """Notes when each thing happened to the new node."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store, self._keys = store, keys
        self.times: Times = {}
        self.stored = asyncio.Event()
        self.gone = asyncio.Event()

    async def follow(self) -> None:
        async with self._store.watch(self._keys.root) as watch, asyncio.TaskGroup() as tasks:
            async for batch in watch:
                now_s = time.time()
                for change in batch.changes:
                    self._take(change, now_s, tasks)

    def _take(self, change: Any, now_s: float, tasks: asyncio.TaskGroup) -> None:
        key, value = change.kv.key, change.kv.value
        if key == self._keys.member("attention", NEW_NODE):
            if isinstance(change, Removed):
                self.gone.set()
                return
            member = json.loads(value)
            if self._first("registered", now_s):
                tasks.create_task(self._until_stored(member["address"]))
            if member["state"] == "READY":
                self._first("READY", now_s)
        elif isinstance(change, Removed):
            return
        elif key == self._keys.spec_attention and decode_spec(value).desired == 2:
            self._first("spec written", now_s)
        elif key.startswith(self._keys.routes) and decode_route(change.kv).tail.node == NEW_NODE:
            self._first("tail moved", now_s)

    def _first(self, phase: str, now_s: float) -> bool:
        return self.times.setdefault(phase, now_s) == now_s

    async def _until_stored(self, address: str) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = attention_pb2_grpc.AttentionStub(channel)  # type: ignore[no-untyped-call]
            while not (await stub.Stats(attention_pb2.StatsRequest(), timeout=5)).used_tokens:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        self._first("first token stored", time.time())
        self.stored.set()


async def answer(address: str, name: str, tokens: list[int]) -> None:
    """Generate until cancelled, counting into `tokens`."""
    request = weight_pb2.GenerateRequest(
        request_id=name,
        prompt_token_ids=[(7919 * number) % 40000 + 20 for number in range(PROMPT_TOKENS)],
        sampling=weight_pb2.Sampling(max_tokens=4000, ignore_eos=True),
    )
    async with grpc.aio.insecure_channel(address) as channel:
        stub = weight_pb2_grpc.WeightStub(channel)  # type: ignore[no-untyped-call]
        async for reply in stub.Generate(request, timeout=600):
            tokens[0] += len(reply.token_ids)


@asynccontextmanager
async def load(store: Store, keys: Keys, name: str) -> AsyncIterator[None]:
    """Answers long enough to be worth moving, under way."""
    kv = await store.get(keys.member("weight", "weight-1"))
    assert kv is not None
    counts = [[0] for _ in range(ANSWERS)]
    address = json.loads(kv.value)["address"]
    tasks = {f"a{i}": answer(address, f"{name}-{i}", count) for i, count in enumerate(counts)}
    async with background(**tasks):
        while min(count[0] for count in counts) < 8:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        yield


async def measure(run: Cluster, store: Store, keys: Keys, number: int, standbys: int) -> Times:
    observer = Observer(store, keys)
    async with (
        asyncio.timeout(ROUND_S),
        background(watch=observer.follow()),
        load(store, keys, f"bench-{number}"),
    ):
        await standby_ready(run, standbys)
        began_s = time.time()
        await run.flumectl("scale", "attention", "--replicas", "2")
        command_s = time.time()
        await observer.stored.wait()
        await asyncio.sleep(0.5)  # for what is still on its way to a log
        times = {phase: at_s for phase, at_s in observer.times.items() if at_s >= began_s}
    for phase, log, event, fields in (
        ("process started", "controller-1", "node_started", {"node": NEW_NODE}),
        ("supervisor imported", NEW_NODE, "imported", {}),
        ("standby called", NEW_NODE, "called", {}),
        ("engine up", NEW_NODE, "engine_started", {}),
        ("attached by the weight node", "weight-1", "lane_up", {"attention_node": NEW_NODE}),
    ):
        if (at_s := run.when(log, event, began_s, **fields)) is not None:
            times[phase] = at_s
    await run.flumectl("scale", "attention", "--replicas", "1")
    async with asyncio.timeout(ROUND_S):
        await observe_gone(store, keys)
    times["(command returned)"] = command_s
    return {phase: 1e3 * (at_s - began_s) for phase, at_s in times.items()}


async def standby_ready(run: Cluster, standbys: int) -> None:
    """Until all of them wait, and the machine has calmed down."""
    while sum(_is_ready(run, path) for path in run.logs.glob("standby-*.log")) < standbys:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    await asyncio.sleep(1.0)


def _is_ready(run: Cluster, path: Path) -> bool:
    return any(line["event"] == "standby_ready" for line in run.log(path.stem))


async def observe_gone(store: Store, keys: Keys) -> None:
    while await store.get(keys.member("attention", NEW_NODE)):  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.5)


async def rounds(run: Cluster, count: int, standbys: int) -> list[Times]:
    async with connect(StoreConfig.parse(f"127.0.0.1:{run.ports['etcd']}")) as store:
        return [await measure(run, store, Keys("default"), n, standbys) for n in range(count)]


def table(name: str, measured: list[Times]) -> list[str]:
    """Phases in order of their median, with the time since the one before."""
    names = {phase for times in measured for phase in times}
    medians = {p: statistics.median([t[p] for t in measured if p in t]) for p in names}
    lines = [f"{name}, {len(measured)} rounds", f"  {'':<28}  at ms   took   worst at"]
    before = 0.0
    for phase, at_ms in sorted(medians.items(), key=lambda item: item[1]):
        worst_ms = max(times[phase] for times in measured if phase in times)
        took = "" if phase.startswith("(") else f"{at_ms - before:6.0f}"
        before = before if phase.startswith("(") else at_ms
        lines.append(f"  {phase:<28} {at_ms:6.0f} {took:>6} {worst_ms:10.0f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--standby", type=int, nargs="+", default=[0, 1], help="numbers of standbys to try")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-zygote", action="store_true", help="every process imports for itself")
    parser.add_argument("--json", type=Path, help="where to write all rounds")
    args = parser.parse_args()
    found: dict[str, list[Times]] = {}
    for standbys in args.standby:
        with cluster(standbys, not args.no_zygote) as run:
            name = f"{standbys} standby" + (", no zygote" if args.no_zygote else "")
            found[name] = asyncio.run(rounds(run, args.rounds, standbys))
        print("\n".join(table(name, found[name])), flush=True)
        limit_ms = LIMITS_MS["standby" if standbys else "no standby"]
        worst_ms = statistics.median(times["first token stored"] for times in found[name])
        print(f"  {'within' if worst_ms <= limit_ms else 'OVER'} {limit_ms:.0f} ms\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
