"""A direct hop on this machine: one process's device asks another's in memory that both map, and is answered.

    python -m flume_attention.cuda.direct_round_trip [--bytes 8192 65536] [--rounds 50]

One line of JSON: a list of `RoundTrip`. A query of so many bytes goes there and a partial of the same size
comes back, HOPS times in a captured step, as the layers of a decode step do; a round trip is a step's mean.
On one card without MPS each hop takes two time slices, so there are no more rounds than fit in ENOUGH_S.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO

import msgspec
import torch
from flume_common.direct_region import ANSWERED_AT, ASKED_AT
from flume_common.gpu.round_trip import DIRECT, DIRECT_MODULE, SIZES_BYTES, RoundTrip
from flume_kernels.gpu.device import Device, Flags
from torch import Tensor

HOPS = 64
ROUNDS = 50
ENOUGH_S = 5.0
DEADLINE_S = 10.0
POLL_S = 2e-5
QUERY_AT = 4096


class _End:
    """One of the two processes: a captured step of HOPS hops over a region that both have mapped."""

    def __init__(
        self, device: Device, memory: Tensor, size_bytes: int, hop: Callable[[_End, int], None]
    ) -> None:
        self._device = device
        self._flags = Flags(device, gates=1, signals=0)
        self._host_number = device.host_tensor(1, dtype=torch.int64)
        self._number = device.tensor(1, dtype=torch.int64)
        self._at = [
            torch.tensor([memory.data_ptr() + at], dtype=torch.int64).to(memory.device)
            for at in (ASKED_AT, ANSWERED_AT)
        ]
        self.query = memory[QUERY_AT : QUERY_AT + size_bytes]
        self.partial = memory[QUERY_AT + size_bytes : QUERY_AT + 2 * size_bytes]
        self.own = device.tensor(size_bytes, dtype=torch.uint8)
        self._flags.host.poison()  # to warm up, nothing waits
        device.warm_up(lambda: self._record(hop))
        self._flags.rearm()
        self._graph = device.capture(lambda: self._record(hop))

    def step(self, number: int) -> float:
        """All hops once; how many seconds it took. Raises TimeoutError."""
        self._host_number.fill_(number)
        start = time.perf_counter()
        self._graph.launch()
        while not self._graph.done():
            if time.perf_counter() - start > DEADLINE_S:
                self._flags.host.poison()
                raise TimeoutError(f"{HOPS} hops take longer than {DEADLINE_S:g} s")
            time.sleep(POLL_S)
        return time.perf_counter() - start

    def ask(self, layer: int) -> None:
        self.query.copy_(self.own)
        self._device.raise_flags(self._flags, self._at[0], self._number, layer)
        self._device.await_flags(self._flags, self._at[1], self._number, layer)
        self.own.copy_(self.partial)

    def answer(self, layer: int) -> None:
        self._device.await_flags(self._flags, self._at[0], self._number, layer)
        self.partial.copy_(self.query)
        self._device.raise_flags(self._flags, self._at[1], self._number, layer)

    def _record(self, hop: Callable[[_End, int], None]) -> None:
        self._number.copy_(self._host_number, non_blocking=True)
        for layer in range(HOPS):
            hop(self, layer)


def open_device() -> Device:
    """The first GPU that this process sees. Raises DeviceUnusable."""
    from flume_kernels.gpu.cuda_device import CudaDevice

    return CudaDevice()


def measure(sizes_bytes: Sequence[int], rounds: int, module: str = DIRECT_MODULE) -> list[RoundTrip]:
    """Raises DeviceUnusable, MappingFailed, TimeoutError, or ConnectionError when the other process ends."""
    return [_measure(open_device(), size, rounds, module) for size in sizes_bytes]


def _measure(device: Device, size_bytes: int, rounds: int, module: str) -> RoundTrip:
    command = [sys.executable, "-m", module, "--answer", str(size_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        try:
            card, handle = _line(other.stdout, "shared ").split()
            end = _End(device, device.map(card, bytes.fromhex(handle)), size_bytes, _End.ask)
            times_us, enough_s = [], time.monotonic() + ENOUGH_S
            for number in range(1, rounds + 2):
                print(number, file=other.stdin, flush=True)
                _line(other.stdout, "step ")
                times_us.append(1e6 * end.step(number) / HOPS)
                if time.monotonic() > enough_s:
                    break
        finally:
            # Ends it when its device is through: killed earlier, it would take others on the card with it.
            other.stdin.close()
    ordered = sorted(times_us[1:] or times_us)
    p50_us, p99_us = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
    return RoundTrip(DIRECT, size_bytes, round(p50_us, 1), round(p99_us, 1))


def _answer(size_bytes: int) -> None:
    """The other end, whose device's memory it is, for as long as steps are asked for."""
    device = open_device()
    shared = device.share(QUERY_AT + 2 * size_bytes)
    print("shared", shared.card, shared.handle.hex(), flush=True)
    end = _End(device, shared.memory, size_bytes, _End.answer)
    for number in sys.stdin:
        print("step", number, flush=True)
        end.step(int(number))


def _line(lines: IO[str], start: str) -> str:
    """The rest of the first line that starts so."""
    for line in lines:
        if line.startswith(start):
            return line.removeprefix(start)
    raise ConnectionError("the other process ended")


def main(module: str = DIRECT_MODULE) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, nargs="+", default=list(SIZES_BYTES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--answer", type=int, metavar="BYTES", help="Be the other end.")
    args = parser.parse_args()
    with torch.inference_mode():
        if args.answer:
            _answer(args.answer)
        else:
            print(msgspec.json.encode(measure(args.bytes, args.rounds, module)).decode())


if __name__ == "__main__":
    main()
