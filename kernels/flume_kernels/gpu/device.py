"""What captured steps ask of a device, and nothing more: memory, flags, capture, replay.

`cuda_device.CudaDevice` is the real one. Tests put a simulated one in its place that replays recorded tensor
operations, so that all of a step but the last call into CUDA runs on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from flume_kernels.gpu.flags import WORDS_PER_FLAG, FlagBlock
from flume_kernels.gpu.shared_memory import SharedMemory


class Graph(Protocol):
    """A captured run: the same operations on the same memory, each time."""

    def launch(self) -> None:
        """Queue one replay; returns at once."""

    def done(self) -> bool:
        """Whether every replay launched so far has ended."""
        ...


class Device(Protocol):
    """One device and one stream of work on it."""

    name: torch.device

    def with_stream(self) -> Device:
        """The same device with another stream; what runs beside is common to both."""
        ...

    def tensor(self, *size: int, dtype: torch.dtype) -> Tensor:
        """Zeroed device memory."""
        ...

    def host_tensor(self, *size: int, dtype: torch.dtype) -> Tensor:
        """Zeroed host memory that device code reads and writes in place; it starts on a page."""
        ...

    def share(self, size_bytes: int) -> SharedMemory:
        """Device memory that other processes of this host can map. Raises RuntimeError."""
        ...

    def map(self, card: str, handle: bytes) -> Tensor:
        """What another process has shared, uint8. Raises MappingFailed."""
        ...

    def signal(self, flags: Flags, number: int) -> None:
        """Queue the next signal on one of the flags: `signals.signal`."""

    def await_(self, flags: Flags, number: int) -> None:
        """Queue a wait for the next opening of one of the flags: `signals.await_`."""

    def raise_flags(
        self, flags: Flags, flags_at: Tensor, step: Tensor, layer: int, number: int | None = None
    ) -> None:
        """Queue `direct.raise_flags` with the status of `flags`; with a number, and the signal on that one
        of them."""

    def await_flags(self, flags: Flags, flags_at: Tensor, step: Tensor, layer: int) -> None:
        """Queue `direct.await_flags` with the status of `flags`; poison in their first gate ends the wait."""

    def stamp(self, word: Tensor) -> None:
        """Queue noting the time in nanoseconds, of a clock of its own, in int64 [1]: `signals.stamp`."""

    def warm_up(self, run: Callable[[], None]) -> None:
        """Run once, for real, and wait for its end: kernels are compiled, libraries have their workspace."""

    def capture(self, run: Callable[[], None]) -> Graph:
        """Record what `run` queues without running it."""
        ...

    def on_stream(self) -> AbstractContextManager[None]:
        """What is queued inside runs on the device's stream, after all that was queued there."""
        ...

    def beside(self) -> AbstractContextManager[None]:
        """What is queued inside runs beside the stream, in order, and waits for nothing on it. See `join`."""
        ...

    def join(self) -> None:
        """What is queued from here on waits for all that was queued beside."""

    def wait_beside(self) -> None:
        """Wait until all that was queued beside is over."""

    def synchronize(self) -> None:
        """Wait until all that was queued on the stream and beside it is over."""


class Flags:
    """Flags between one device and its host, and what the device counts on each.

    words int64 [gates + signals, 16] in host memory; counters int64 [gates + signals] and status int64 [1] in
    device memory; `host` is the host's end. Gates have the lower numbers.
    """

    def __init__(self, device: Device, gates: int, signals: int) -> None:
        self.words = device.host_tensor(gates + signals, WORDS_PER_FLAG, dtype=torch.int64)
        self.counters = device.tensor(gates + signals, dtype=torch.int64)
        self.status = device.tensor(1, dtype=torch.int64)
        self.host = FlagBlock(self.words.numpy().data, gates, signals)
        self._device = device

    def rearm(self) -> None:
        """Both ends count from 0 again. Waits for the device, before and after."""
        self._device.synchronize()
        with self._device.on_stream():
            self.counters.zero_()
            self.status.zero_()
        self._device.synchronize()
        self.host.rearm()


PAGE_BYTES = 4096


def on_page(allocate: Callable[[int], Tensor], size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that starts on a page, out of uint8 memory that `allocate(bytes)` gives."""
    size_bytes = math.prod(size) * dtype.itemsize
    raw = allocate(size_bytes + PAGE_BYTES)
    start = -raw.data_ptr() % PAGE_BYTES
    return raw[start : start + size_bytes].view(dtype).view(size)


def capture(device: Device, flags: Flags, run: Callable[[], None]) -> Graph:
    """Warm up with every wait open, so that nothing hangs and nothing is counted, then capture."""
    flags.host.open_wide()
    device.warm_up(run)
    flags.rearm()
    return device.capture(run)
