"""Triton made ready in a process that opens no device, for those forked from it.

A process' first launch costs 0.3 s although its kernel lies compiled in Triton's cache: Triton hashes itself
(0.27 s) and imports what compiles. Compiling a kernel does both, and needs no device. After `preload` a first
launch finds its kernel within 2 to 3 ms (on two cores at 2.6 GHz with Triton 3.7; what a device then does to
load it comes on top).

* PreloadFailed    something could not be compiled; says why
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from flume_kernels.gpu import (
    attention_plan,
    decode_attention,
    decode_tuning,
    direct,
    kv_append,
    merge_partials,
    signals,
)
from flume_kernels.gpu.flags import POISON, WORDS_PER_FLAG

MODULES: tuple[ModuleType, ...] = (
    attention_plan, decode_attention, direct, kv_append, merge_partials, signals,
)  # fmt: skip


class PreloadFailed(Exception):
    """Whoever is forked from here does the work itself."""


def preload(capability: int) -> None:
    """For cards of this compute capability, 90 for 9.0; others compile what they have not. Raises
    PreloadFailed.

    What may start threads or load CUDA's driver is done by a child, which leaves it in Triton's cache.
    """
    _in_a_child(lambda: _compile(capability))
    _compile_flags(capability)
    for module in MODULES:
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                _ = kernel.cache_key  # of its source and all that it calls
    decode_tuning.decode_hash()
    with suppress(Exception):
        nvidia.libcuda_dirs()  # asks ldconfig


def _in_a_child(work: Callable[[], None]) -> None:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if status:
        raise PreloadFailed(f"compiling ended with {os.waitstatus_to_exitcode(status)}")


def _compile(capability: int) -> None:
    _compile_flags(capability)
    with suppress(Exception):  # without a driver on this machine there is nothing to link it to
        nvidia.CudaUtils()


def _compile_flags(capability: int) -> None:
    """The kernels that every captured step has, with arguments aligned as those of a step are."""
    words = torch.zeros(2, WORDS_PER_FLAG, dtype=torch.int64)
    counters, status = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with _compiling_for(capability):
        for number, kernel in enumerate((signals._await_kernel, signals._signal_kernel)):
            kernel.run(
                words[number, :1], counters[number : number + 1], status,
                POISONED=POISON, num_warps=1, grid=(1,), warmup=True,
            )  # fmt: skip


class _NoDevice:
    """Stands for the driver where kernels are compiled and not launched."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return -1  # none that there is: a kernel belongs to the device that it was first launched on

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextmanager
def _compiling_for(capability: int) -> Iterator[None]:
    before = driver._active
    driver.set_active(_NoDevice(capability))
    try:
        yield
    finally:
        driver.set_active(before)
