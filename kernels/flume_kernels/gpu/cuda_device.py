"""The NVIDIA GPU behind `device.Device`: the last call into CUDA, and the only module that makes it.

* DeviceUnusable    there is no GPU that torch can use, or flags cannot work with it; says why
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flume_kernels.gpu import direct, shared_memory, signals
from flume_kernels.gpu.device import Flags, on_page


class DeviceUnusable(Exception):
    """Captured steps cannot run here."""


class CudaGraph:
    """One torch.cuda.CUDAGraph on the stream of its device."""

    def __init__(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
        self._graph = graph
        self._stream = stream
        self._ended = torch.cuda.Event()

    def launch(self) -> None:
        with torch.cuda.stream(self._stream):
            self._graph.replay()
            self._ended.record(self._stream)

    def done(self) -> bool:
        return bool(self._ended.query())


class CudaDevice:
    """One GPU, a stream for steps and a stream beside it. `name` is torch's, "cuda:0".

    Nothing here waits for other streams: a step on one of them may be waiting for its host, and that may be
    us.

    Raises DeviceUnusable, also where the host may reorder stores: a gate could then open before its data is
    there.
    """

    def __init__(self, name: str = "cuda:0", beside: torch.cuda.Stream | None = None) -> None:
        if platform.machine() != "x86_64":
            raise DeviceUnusable(f"flags need the ordered stores of x86-64, this is {platform.machine()}")
        if torch.version.cuda is None:
            raise DeviceUnusable(f"torch {torch.__version__} is built without CUDA")
        if not torch.cuda.is_available():
            raise DeviceUnusable("torch finds no GPU that it can use")
        self.name = torch.device(name)
        try:
            torch.cuda.set_device(self.name)
            torch.empty(1, device=self.name)  # makes the context
        except RuntimeError as error:
            raise DeviceUnusable(f"{name}: {error}") from error
        self._stream = torch.cuda.Stream(self.name)
        self._beside = beside or torch.cuda.Stream(self.name)
        # Common to all graphs of the stream: one runs at a time, and none keeps anything in there.
        self._graph_memory = torch.cuda.graph_pool_handle()

    def with_stream(self) -> CudaDevice:
        """The same GPU with another stream for steps; what runs beside is common to both."""
        return CudaDevice(str(self.name), self._beside)

    def tensor(self, *size: int, dtype: torch.dtype) -> Tensor:
        made = torch.zeros(size, dtype=dtype, device=self.name)
        torch.cuda.current_stream(self.name).synchronize()  # before another stream writes there
        return made

    def host_tensor(self, *size: int, dtype: torch.dtype) -> Tensor:
        def pinned(size_bytes: int) -> Tensor:
            return torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=True)

        return on_page(pinned, size, dtype)

    def share(self, size_bytes: int) -> shared_memory.SharedMemory:
        return shared_memory.share(self.tensor(size_bytes, dtype=torch.uint8))

    def map(self, card: str, handle: bytes) -> Tensor:
        return shared_memory.map_shared(self.name, card, handle)

    def signal(self, flags: Flags, number: int) -> None:
        signals.signal(*_words(flags, number))

    def await_(self, flags: Flags, number: int) -> None:
        signals.await_(*_words(flags, number))

    def raise_flags(
        self, flags: Flags, flags_at: Tensor, step: Tensor, layer: int, number: int | None = None
    ) -> None:
        signal = None if number is None else _words(flags, number)[:2]
        direct.raise_flags(flags_at, step, layer, flags.status, signal)

    def await_flags(self, flags: Flags, flags_at: Tensor, step: Tensor, layer: int) -> None:
        direct.await_flags(flags_at, step, layer, flags.words[0, :1], flags.status)

    def stamp(self, word: Tensor) -> None:
        signals.stamp(word)

    def warm_up(self, run: Callable[[], None]) -> None:
        # What was allocated and filled until now was so on the current stream.
        self._stream.wait_stream(torch.cuda.current_stream(self.name))
        with self.on_stream():
            run()
        self.synchronize()

    def capture(self, run: Callable[[], None]) -> CudaGraph:
        graph = torch.cuda.CUDAGraph()
        with self.on_stream():
            # Not `torch.cuda.graph`, which waits for the whole device first.
            graph.capture_begin(pool=self._graph_memory, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        return CudaGraph(graph, self._stream)

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def beside(self) -> Iterator[None]:
        with torch.cuda.stream(self._beside):
            yield

    def join(self) -> None:
        self._stream.wait_stream(self._beside)

    def wait_beside(self) -> None:
        self._beside.synchronize()

    def synchronize(self) -> None:
        self._stream.synchronize()
        self._beside.synchronize()


def _words(flags: Flags, number: int) -> tuple[Tensor, Tensor, Tensor]:
    return flags.words[number, :1], flags.counters[number : number + 1], flags.status
