"""Stands for a GPU where captured steps are tested without one.

A capture records tensor operations; a replay does them again on the memory they were recorded with. No
Python of the captured function runs again: what it read when it was captured is baked in, as on a device.
Reading a value back during a capture is an error, as there. Work that was launched moves on only inside
`run_some`, and a little when a graph is asked whether it is done, so a test decides how host and device
interleave; `running` gives the device a thread instead.

Signals and waits count as the kernels in `flume_kernels.gpu.signals` do. Memory that others map is a file's:
as a device's, it lives for as long as somebody has it mapped.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections import deque
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import torch
from flume_kernels.gpu import direct_reference
from flume_kernels.gpu.device import on_page
from flume_kernels.gpu.flags import POISON
from flume_kernels.gpu.shared_memory import MappingFailed, SharedMemory
from torch.utils._python_dispatch import TorchDispatchMode

CARD = os.environ.get("SIMULATED_CARD", "GPU-simulated")  # its UUID; processes may have different ones
NEVER_CAPTURED = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class NotCapturable(RuntimeError):
    """A device would have refused to capture this."""


class SimulatedGraph:
    def __init__(self, device, operations):
        self._device = device
        self._operations = operations
        self.replays = 0

    def launch(self):
        self.replays += 1
        self._device.launch(self._operations)

    def done(self):
        self._device.move_on()
        return not self._device.queue


class SimulatedDevice:
    """One stream of a device, which several may be of. Each moves on alone, but for `running`."""

    name = torch.device("cpu")

    def __init__(self, streams=None):
        self.queue = deque()  # operations; each answers False while it cannot pass
        self.captures = 0
        self._recording = None
        self._streams = streams or SimpleNamespace(
            all=[], run_by_themselves=False, launched=threading.Event()
        )
        self._streams.all.append(self)

    def with_stream(self):
        return SimulatedDevice(self._streams)

    def tensor(self, *size, dtype):
        return torch.zeros(size, dtype=dtype)

    def host_tensor(self, *size, dtype):
        return on_page(partial(torch.zeros, dtype=torch.uint8), size, dtype)

    def share(self, size_bytes):
        fd = os.memfd_create("device-memory")  # kept for good: whoever opens it by our pid may come late
        os.ftruncate(fd, size_bytes)
        return SharedMemory(_mapped(fd), CARD, f"/proc/{os.getpid()}/fd/{fd}".encode())

    def map(self, card, handle):
        if card != CARD:
            raise MappingFailed(f"the card {card} is not visible to this process")
        try:
            fd = os.open(handle, os.O_RDWR)
        except OSError as error:
            raise MappingFailed(f"{card}: {error}") from error
        try:
            return _mapped(fd)
        finally:
            os.close(fd)

    def signal(self, flags, number):
        self.call(partial(_signal, flags, number))

    def await_(self, flags, number):
        self.call(partial(_await, flags, number))

    def raise_flags(self, flags, flags_at, step, layer, number=None):
        self.call(lambda: direct_reference.raise_flags(flags_at, step, layer, flags.status))
        if number is not None:
            self.signal(flags, number)

    def await_flags(self, flags, flags_at, step, layer):
        self.call(
            lambda: direct_reference.await_flags(flags_at, step, layer, flags.words[0, :1], flags.status)
        )

    def stamp(self, word):
        self.call(lambda: word.fill_(time.perf_counter_ns()))

    def call(self, operation):
        """Queue a Python function; it answers False to be asked again."""
        if self._recording is not None:
            self._recording.append(operation)
        elif operation() is False:
            raise RuntimeError("a wait outside of a replay would never end")

    def warm_up(self, run):
        run()

    def capture(self, run):
        self.captures += 1
        self._recording = []
        try:
            with _Recorder(self._recording):
                run()
            return SimulatedGraph(self, self._recording)
        finally:
            self._recording = None

    def on_stream(self):
        return nullcontext()

    beside = on_stream

    def join(self):
        pass

    wait_beside = join

    def synchronize(self):
        while self.queue:
            if self._streams.run_by_themselves:
                time.sleep(0)
            elif not self.run_some(len(self.queue)):
                raise RuntimeError("the device waits for ever")

    def launch(self, operations):
        self.queue.extend(operations)
        self._streams.launched.set()

    def move_on(self):
        """Do a few operations, where no thread does them."""
        if not self._streams.run_by_themselves:
            self.run_some(4)

    def run_some(self, count):
        """Do up to `count` operations; returns how many passed."""
        with torch.inference_mode():
            for passed in range(count):
                if not self.queue or self.queue[0]() is False:
                    return passed
                self.queue.popleft()
        return count

    @contextmanager
    def running(self):
        """All streams work by themselves, until the block ends."""
        ended = threading.Event()

        def work():
            while not ended.is_set():
                if not any(stream.queue for stream in self._streams.all):
                    self._streams.launched.wait(0.5)
                self._streams.launched.clear()
                if not sum([stream.run_some(64) for stream in self._streams.all]):
                    time.sleep(2e-5)

        thread = threading.Thread(target=work, daemon=True)
        self._streams.run_by_themselves = True
        thread.start()
        try:
            yield
        finally:
            ended.set()
            self._streams.launched.set()
            thread.join()
            self._streams.run_by_themselves = False


def _mapped(fd):
    return torch.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size), dtype=torch.uint8)


def _signal(flags, number):
    flags.counters[number] += 1
    count = POISON if flags.status.item() else flags.counters[number].item()
    flags.words[number, 0] = count


def _await(flags, number):
    seen = flags.words[number, 0].item()
    if seen < flags.counters[number].item() + 1:
        return False
    flags.counters[number] += 1
    if seen >= POISON:
        flags.status.fill_(1)
    return True


class _Recorder(TorchDispatchMode):
    def __init__(self, operations):
        super().__init__()
        self._operations = operations

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # otherwise the first capture imports the compiler, for seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in NEVER_CAPTURED:
            raise NotCapturable(f"{func} reads device memory on the host")
        result = func(*args, **(kwargs or {}))
        self._operations.append(partial(_again, func, args, kwargs or {}, result))
        return result


def _again(func, args, kwargs, result):
    for old, new in zip(_tensors(result), _tensors(func(*args, **kwargs)), strict=True):
        if new.data_ptr() != old.data_ptr():
            old.copy_(new)


def _tensors(result):
    found = result if isinstance(result, (tuple, list)) else [result]
    return [item for item in found if isinstance(item, torch.Tensor)]
