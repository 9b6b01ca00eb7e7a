"""How long a flag lies there before the driver of captured steps acts on it, without a GPU.

    python bench/gpu_poller.py [--steps 400] [--layers 32] [--disturb] [--out poller.json]

The device is a process of its own that raises flags in shared memory and waits at gates, as kernels do; the
driver is the one weight nodes run, with messages that are answered at once. Printed in microseconds: from the
device's flag to the call that would send the query, and from the flag to the open gate as the device sees it.
`--disturb` runs a second Python thread beside the driver, which is what its process must never have.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from flume_kernels.gpu.flags import FLAG_STRIDE_BYTES, WORDS_PER_FLAG, FlagBlock
from flume_kernels.gpu.watchdog import Watchdog
from flume_weight.cuda.captured_steps import CapturedStep
from flume_weight.cuda.driver import StepDriver

GATE, QUERY, ENDED, LAUNCHED, RAISED_NS = range(5)  # words of the shared memory, a flag's stride apart
THINKING_S = 20e-6  # between a gate and the next flag: what a layer takes


def word(number: int) -> int:
    return number * WORDS_PER_FLAG


def shared_words(path: str) -> memoryview:
    """The file as int64 words that every process which maps it sees."""
    with Path(path).open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 5 * FLAG_STRIDE_BYTES)).cast("q")


def device(path: str, steps: int, layers: int, round_trips_ns: multiprocessing.Queue[list[int]]) -> None:
    """A captured step of `layers` layers, `steps` times."""
    words = shared_words(path)
    opened = raised = 0
    times = []
    for step in range(1, steps + 1):
        while words[word(LAUNCHED)] < step:
            pass
        for _ in range(layers):
            spin(THINKING_S)
            raised += 1
            words[word(RAISED_NS)] = start = time.perf_counter_ns()
            words[word(QUERY)] = raised
            opened += 1
            while words[word(GATE)] < opened:
                pass
            times.append(time.perf_counter_ns() - start)
        raised += 1
        words[word(QUERY)] = raised
        words[word(ENDED)] = step
    round_trips_ns.put(times)


def spin(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


class Instant:
    """Messages that are answered at once; notes when each query was sent."""

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self.waits_ns: list[int] = []

    def progress(self) -> None: ...

    def query(self, microbatch: int, layer: int) -> None:
        self.waits_ns.append(time.perf_counter_ns() - self._words[word(RAISED_NS)])

    def keys(self, microbatch: int, layer: int) -> None: ...

    def arrived(self, microbatch: int, layer: int) -> bool:
        return True


class Launch:
    """The graph, as far as the host has one: asks the other process for a replay."""

    def __init__(self, words: memoryview) -> None:
        self._words = words

    def launch(self) -> None:
        self._words[word(LAUNCHED)] += 1

    def done(self) -> bool:
        return self._words[word(ENDED)] == self._words[word(LAUNCHED)]


def measure(steps: int, layers: int, disturb: bool) -> dict[str, dict[str, float]]:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.truncate(5 * FLAG_STRIDE_BYTES)
        return run(file.name, steps, layers, disturb)


def run(path: str, steps: int, layers: int, disturb: bool) -> dict[str, dict[str, float]]:
    words = shared_words(path)
    flags = FlagBlock(words.cast("B")[: 3 * FLAG_STRIDE_BYTES], gates=1, signals=2)
    context = multiprocessing.get_context("spawn")
    round_trips: multiprocessing.Queue[list[int]] = context.Queue()
    other = context.Process(target=device, args=(path, steps, layers, round_trips), daemon=True)
    other.start()
    buffers = SimpleNamespace(flags=SimpleNamespace(host=flags))
    step = CapturedStep(buffers, Launch(words), layers)  # type: ignore[arg-type]
    messages, over = Instant(words), threading.Event()
    if disturb:
        threading.Thread(target=lambda: [None for _ in iter(over.is_set, True)], daemon=True).start()
    with Watchdog() as watchdog:
        driver = StepDriver(watchdog, timeout_s=60.0)
        for _ in range(steps):
            driver.run(step, messages)
    over.set()
    trips_ns = round_trips.get(timeout=60)
    other.join(10)
    skip = len(trips_ns) // 10
    return {
        "flag to send": percentiles_us(messages.waits_ns[skip:]),
        "flag to open gate": percentiles_us(trips_ns[skip:]),
    }


def percentiles_us(times_ns: Sequence[int]) -> dict[str, float]:
    us = np.array(times_ns) / 1e3
    named = {"p50": 50, "p90": 90, "p99": 99, "p99.9": 99.9}
    return {name: round(float(np.percentile(us, at)), 2) for name, at in named.items()} | {
        "max": round(float(us.max()), 1)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--disturb", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = measure(args.steps, args.layers, args.disturb)
    for name, numbers in found.items():
        print(f"{name:18}", "  ".join(f"{key} {value:8.2f}" for key, value in numbers.items()), "us")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
