"""UCX on this machine, and a round trip between two processes over a lane, as nodes have one.

    python -m flume_common.gpu.round_trip [--bytes 8192 65536] [--rounds 300]

One line of JSON: `Ucx`. A query of so many bytes goes to the other process and a partial of the same size
comes back. Both look for it for a while before they sleep, as engines do in a step. `look` runs all of it in
a process of its own, so that nothing of UCX stays in the caller's.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

import msgspec

MODULE = "flume_common.gpu.round_trip"
DIRECT_MODULE = "flume_attention.cuda.direct_round_trip"
TRANSPORTS = {"shared memory": "tcp,sm,self", "TCP": "tcp,self"}
DIRECT = "device memory"
SIZES_BYTES = (8192, 65536)
ROUNDS = 300
DEADLINE_S = 10.0
LOOK_TIMEOUT_S = 90.0
SPIN_S = 1e-3


class RoundTrip(msgspec.Struct, frozen=True):
    """Microseconds there and back."""

    transport: str  # a key of TRANSPORTS, or DIRECT
    size_bytes: int
    p50_us: float
    p99_us: float


class Ucx(msgspec.Struct, frozen=True):
    version: str
    resources: list[str]  # "tcp/eth0", "posix/memory"
    round_trips: list[RoundTrip]
    failures: dict[str, str] = {}  # by transport: why it could not be measured


class Unmeasured(Exception):
    """The process that was to measure failed; says why."""


class UcxUnavailable(Unmeasured):
    """UCX cannot be loaded, or its process failed."""


def look(sizes_bytes: Sequence[int] = SIZES_BYTES, rounds: int = ROUNDS) -> Ucx:
    """Takes some seconds. Raises UcxUnavailable."""
    try:
        line = _last_line(MODULE, "--rounds", str(rounds), "--bytes", *map(str, sizes_bytes))
    except Unmeasured as error:
        raise UcxUnavailable(str(error)) from error
    return msgspec.json.decode(line, type=Ucx)


def look_direct(
    sizes_bytes: Sequence[int] = SIZES_BYTES, rounds: int = 50, module: str = DIRECT_MODULE
) -> list[RoundTrip]:
    """From one process's device to another's and back, in memory that both map. Takes some seconds. Raises
    Unmeasured."""
    line = _last_line(module, "--rounds", str(rounds), "--bytes", *map(str, sizes_bytes))
    return msgspec.json.decode(line, type=list[RoundTrip])


def _last_line(module: str, *args: str) -> bytes:
    """What a module says in a process of its own; libraries write warnings before. Raises Unmeasured."""
    command = [sys.executable, "-m", module, *args]
    try:
        done = subprocess.run(command, capture_output=True, timeout=LOOK_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unmeasured(f"no round trip within {LOOK_TIMEOUT_S:g} s") from error
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise Unmeasured(last[0] if last else f"exit code {done.returncode}")
    return done.stdout.strip().splitlines()[-1]


def resources(context_info: str) -> list[str]:
    """Transports and their devices as UCX lists those of a context."""
    return re.findall(r"resource \d+ .*flags -- (\S+)", context_info)


def _measure(sizes_bytes: Sequence[int], rounds: int) -> Ucx:
    from flume_common.lanes import ucx

    version = ".".join(map(str, ucx.lib.get_ucx_version()))
    found = resources(ucx.lib.UCXContext({"TLS": "all"}).info)
    trips: list[RoundTrip] = []
    failures: dict[str, str] = {}
    for transport, tls in TRANSPORTS.items():
        try:
            trips += [RoundTrip(transport, *each) for each in _round_trips(tls, sizes_bytes, rounds)]
        except (
            Exception
        ) as error:  # whatever it is, the other transport and the reader are better off with it
            failures[transport] = f"{type(error).__name__}: {error}"
    return Ucx(version, found, trips, failures)


def _round_trips(tls: str, sizes_bytes: Sequence[int], rounds: int) -> list[tuple[int, float, float]]:
    from flume_common.lanes import Port, Side
    from flume_common.wire import Kind

    shape = _shape(max(sizes_bytes))
    command = [sys.executable, "-m", MODULE, "--echo", tls, "--bytes", *map(str, sizes_bytes)]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other,
        Port(tls=tls, spin_s=SPIN_S) as port,
    ):
        assert other.stdin is not None and other.stdout is not None
        try:
            address = bytes.fromhex(_hex_line(other.stdout))
            print(port.address.hex(), file=other.stdin, flush=True)
            lane = port.connect("the other process", address, shape, Side.WEIGHT, send_lane=1, receive_lane=2)
            queries, partials = lane.sender(Kind.QUERY), lane.receiver(Kind.PARTIAL)
            found = []
            for size in sizes_bytes:
                times_us = []
                for _ in range(rounds + rounds // 10):
                    start = time.perf_counter()
                    queries.send(_await(port, queries.frame), size)
                    partials.give_back(_await(port, partials.poll))
                    times_us.append(1e6 * (time.perf_counter() - start))
                found.append((size, *_percentiles(times_us[rounds // 10 :])))
            return found
        finally:
            other.stdin.close()  # ends it
            other.terminate()


def _echo(tls: str, sizes_bytes: Sequence[int]) -> None:
    """The other end, until it is told to end."""
    from flume_common.lanes import Port, Side
    from flume_common.wire import Header, Kind

    with Port(tls=tls, spin_s=SPIN_S) as port:
        print(port.address.hex(), flush=True)
        peer, shape = bytes.fromhex(sys.stdin.readline()), _shape(max(sizes_bytes))
        lane = port.connect("the measuring process", peer, shape, Side.ATTENTION, send_lane=2, receive_lane=1)
        queries, partials = lane.receiver(Kind.QUERY), lane.sender(Kind.PARTIAL)
        while True:
            query = _await(port, queries.poll)
            size = int(query.header[Header.BODY_BYTES])
            queries.give_back(query)
            partials.send(_await(port, partials.frame), size)


def _shape(most_bytes: int) -> Any:
    """A lane that carries queries of so many bytes."""
    from flume_common.layout import KvLayout
    from flume_common.wire import LaneShape

    layout = KvLayout(num_layers=1, num_query_heads=1, num_kv_heads=1, head_dim=64, dtype="float32")
    return LaneShape(layout, -(-most_bytes // 256), 1, kv_frame_bytes=4096)


def _await(port: Any, take: Callable[[], Any]) -> Any:
    found: list[Any] = []

    def ready() -> bool:
        item = take()
        if item is not None:
            found.append(item)
        return bool(found)

    if not port.wait(ready, DEADLINE_S):
        raise TimeoutError(f"nothing came within {DEADLINE_S:g} s")
    return found[0]


def _hex_line(lines: IO[str]) -> str:
    for line in lines:
        if re.fullmatch(r"[0-9a-f]+\n", line):
            return line
    raise ConnectionError("the other process ended")


def _percentiles(times_us: list[float]) -> tuple[float, float]:
    ordered = sorted(times_us)
    return round(ordered[len(ordered) // 2], 1), round(ordered[len(ordered) * 99 // 100], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, nargs="+", default=list(SIZES_BYTES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--echo", metavar="TLS", help="Be the other end.")
    args = parser.parse_args()
    if args.echo:
        _echo(args.echo, args.bytes)
    else:
        print(msgspec.json.encode(_measure(args.bytes, args.rounds)).decode())


if __name__ == "__main__":
    main()
