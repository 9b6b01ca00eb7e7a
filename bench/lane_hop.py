"""Round trips over one lane between two processes: QUERY one way, PARTIAL of the same size back.

    python bench/lane_hop.py [--tls tcp,sm,self tcp,self] [--spin-us 0 50] [--bytes 2400 65536 1048576]

Prints the median and the 90th and 99th percentile in microseconds; a hop is half of it. `--cores`
says where the two processes run: `free` leaves it to the scheduler, `apart` pins them to two cores,
`same` to one, which is what happens when more engines than cores are busy.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from multiprocessing.connection import Connection

import numpy as np
from flume_common.lanes import Frame, Lane, Port, Receiver, Side
from flume_common.layout import KvLayout
from flume_common.wire import Header, Kind, LaneShape

LAYOUT = KvLayout(num_layers=30, num_query_heads=9, num_kv_heads=3, head_dim=64, dtype="float32")
DEADLINE_S = 10.0
CORES = {"free": (None, None), "apart": (0, 1), "same": (0, 0)}


def shape_for(body_bytes: int) -> LaneShape:
    token_bytes = LAYOUT.num_query_heads * LAYOUT.head_dim * LAYOUT.itemsize
    return LaneShape(LAYOUT, -(-body_bytes // token_bytes), 16, kv_frame_bytes=4096)


def pin(core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})


def receive(port: Port, receiver: Receiver) -> Frame:
    arrived: list[Frame] = []

    def ready() -> bool:
        if (frame := receiver.poll()) is not None:
            arrived.append(frame)
        return bool(arrived)

    if not port.wait(ready, DEADLINE_S):
        raise TimeoutError(f"nothing arrived within {DEADLINE_S} s")
    return arrived[0]


def echo(pipe: Connection, tls: str, spin_s: float, max_bytes: int, core: int | None) -> None:
    """The attention end: an empty QUERY ends it."""
    pin(core)
    with Port(tls=tls, spin_s=spin_s) as port:
        pipe.send_bytes(port.address)
        shape = shape_for(max_bytes)
        lane = port.connect("w", pipe.recv_bytes(), shape, Side.ATTENTION, send_lane=2, receive_lane=1)
        queries, partials = lane.receiver(Kind.QUERY), lane.sender(Kind.PARTIAL)
        while True:
            query = receive(port, queries)
            size = int(query.header[Header.BODY_BYTES])
            queries.give_back(query)
            if not size:
                return
            partial = partials.frame()
            assert partial is not None
            partials.send(partial, size)


def round_trips_us(port: Port, lane: Lane, size_bytes: int, rounds: int) -> np.ndarray:
    queries, partials = lane.sender(Kind.QUERY), lane.receiver(Kind.PARTIAL)
    times = np.empty(rounds)
    for i in range(rounds):
        query = queries.frame()
        assert query is not None
        start = time.perf_counter()
        queries.send(query, size_bytes)
        partials.give_back(receive(port, partials))
        times[i] = time.perf_counter() - start
    return times[rounds // 10 :] * 1e6


def measure(tls: str, spin_s: float, sizes: list[int], rounds: int, cores: str) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    here, there = CORES[cores]
    pin(here)
    args = (theirs, tls, spin_s, max(sizes), there)
    peer = context.Process(target=echo, args=args, daemon=True)
    peer.start()
    with Port(tls=tls, spin_s=spin_s) as port:
        address = ours.recv_bytes()
        ours.send_bytes(port.address)
        shape = shape_for(max(sizes))
        lane = port.connect("a", address, shape, Side.WEIGHT, send_lane=1, receive_lane=2)
        for size in sizes:
            times = round_trips_us(port, lane, size, max(rounds * 2400 // max(size, 2400), rounds // 10))
            median, p90, p99 = np.percentile(times, (50, 90, 99))
            print(
                f"{tls:12} cores {cores:5} spin {spin_s * 1e6:4.0f} us {size:8} bytes: "
                f"{median:7.1f} {p90:7.1f} {p99:7.1f} us",
                flush=True,
            )
        query = lane.sender(Kind.QUERY).frame()
        assert query is not None
        lane.sender(Kind.QUERY).send(query, 0)
        port.wait(lambda: not peer.is_alive(), DEADLINE_S)
    peer.join(DEADLINE_S)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tls", nargs="+", default=["tcp,sm,self", "tcp,self"])
    parser.add_argument("--spin-us", nargs="+", type=float, default=[0, 50])
    parser.add_argument("--bytes", nargs="+", type=int, default=[2400, 65536, 1 << 20])
    parser.add_argument("--cores", nargs="+", choices=CORES, default=["free"])
    parser.add_argument("--rounds", type=int, default=1000)
    args = parser.parse_args()
    for tls in args.tls:
        for cores in args.cores:
            for spin_us in args.spin_us:
                measure(tls, spin_us * 1e-6, args.bytes, args.rounds, cores)


if __name__ == "__main__":
    main()
