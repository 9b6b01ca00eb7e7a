"""Flags between the device, the host and peers: how one captured step tells another that data is there.

A *flag* is an int64 in memory that both ends see (pinned host memory, or device memory mapped by a peer).
It only grows. A *counter* is an int64 in device memory of one end: the number of the last signal given or
awaited. It is advanced by the kernels themselves, so that a replayed graph, in which every literal is the
same again, still counts on.

    signal    counter += 1, then flag = counter, after everything earlier on the stream is visible to all
    await_    counter += 1, then spins until flag >= counter

Poison: the host's watchdog writes POISON into a flag to release whoever waits on it, now and for good. The
waiter notes it in its *status* word; from then on its own signals give POISON too, so the failure reaches
the other end rather than stale data. A step is good when status is 0 at its end. `rearm` puts flags,
counters and status back to 0, both ends together, nothing running.

Keep flags 128 bytes apart. `await_` and `signal` are launches of one program; the kernels after an `await_`
on the same stream see what was written before the flag. Without a host watchdog a lost peer means a device
that spins for ever.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flume_kernels.gpu.flags import FLAG_STRIDE_BYTES, POISON

__all__ = ["FLAG_STRIDE_BYTES", "POISON", "await_", "land", "poison", "rearm", "signal", "stamp"]


@triton.jit
def give_signal(flag_ptr, counter_ptr, good, POISONED: tl.constexpr):
    """The next signal of a counter, or poison, by a kernel's only program."""
    count = tl.load(counter_ptr) + 1
    tl.store(counter_ptr, count)
    value = tl.where(good, count, tl.full([], POISONED, tl.int64))
    tl.atomic_xchg(flag_ptr, value, sem="release", scope="sys")


@triton.jit
def _signal_kernel(flag_ptr, counter_ptr, status_ptr, POISONED: tl.constexpr):
    give_signal(flag_ptr, counter_ptr, tl.load(status_ptr) == 0, POISONED)


@triton.jit
def _await_kernel(flag_ptr, counter_ptr, status_ptr, POISONED: tl.constexpr):
    count = tl.load(counter_ptr) + 1
    tl.store(counter_ptr, count)
    # A volatile load, not an atomic: over PCIe an atomic may write back what the host has replaced.
    seen = tl.load(flag_ptr, volatile=True)
    while seen < count:
        seen = tl.load(flag_ptr, volatile=True)
    if seen >= POISONED:
        tl.store(status_ptr, 1)


@triton.jit
def _land_kernel(from_ptr, to_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to_ptr + at, tl.load(from_ptr + at, mask=at < count, volatile=True), mask=at < count)


@triton.jit
def _stamp_kernel(out_ptr):
    now = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )
    tl.store(out_ptr, now)


def signal(flag: Tensor, counter: Tensor, status: Tensor) -> None:
    """Give the next signal on `flag`; POISON instead when `status` is set. All int64 [1]. One kernel on
    this stream."""
    _check(flag, counter, status)
    _signal_kernel[(1,)](flag, counter, status, POISONED=POISON, num_warps=1)


def await_(flag: Tensor, counter: Tensor, status: Tensor) -> None:
    """Hold this stream until the next signal on `flag` is there; sets `status` to 1 when it is POISON. All
    int64 [1]."""
    _check(flag, counter, status)
    _await_kernel[(1,)](flag, counter, status, POISONED=POISON, num_warps=1)


def stamp(out: Tensor) -> None:
    """The device's clock in nanoseconds, which ticks once a microsecond or more often, when this stream comes
    to it. out int64 [1]."""
    _check(out)
    _stamp_kernel[(1,)](out, num_warps=1)


def land(source: Tensor, target: Tensor) -> None:
    """Copy what a peer or the host wrote into `source` past every cache. Same dtype and size, both
    contiguous."""
    if source.dtype is not target.dtype or source.numel() != target.numel():
        raise ValueError(f"{source.dtype} [{source.numel()}] does not fit {target.dtype} [{target.numel()}]")
    if not (source.is_contiguous() and target.is_contiguous()):
        raise ValueError("source and target must be contiguous")
    if source.numel():
        _land_kernel[(triton.cdiv(source.numel(), 2048),)](
            source, target, source.numel(), BLOCK=2048, num_warps=4
        )


def poison(flag: Tensor) -> None:
    """Release whoever waits on this flag, from the host. The flag must be host memory, or nothing may be
    queued before."""
    flag.fill_(POISON)


def rearm(*words: Tensor) -> None:
    """Put flags, counters and status words back to 0. Nothing may run on either end."""
    for word in words:
        word.zero_()


def _check(*words: Tensor) -> None:
    for word in words:
        if word.dtype is not torch.int64 or word.numel() != 1:
            raise ValueError(f"flags, counters and status are int64 [1], got {word.dtype} [{word.numel()}]")
