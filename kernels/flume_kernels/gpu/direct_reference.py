"""Slow, obvious definitions of `direct`, on addresses of this process. Tests compare against these, and
simulated devices use them in the kernels' place. No triton."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from flume_kernels.gpu import reference
from flume_kernels.gpu.flags import LAYER_BITS, POISON


def at_address(address: int, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A view of host memory, not checked in any way."""
    memory = (ctypes.c_char * (math.prod(size) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(size)


def push(q: Tensor, queries_at: Tensor) -> None:
    """q [rows, H, D]: row r to every address queries_at [P, r] that is not 0."""
    for addresses in queries_at.tolist():
        for row, address in enumerate(addresses):
            if address:
                at_address(address, tuple(q.shape[1:]), q.dtype).copy_(q[row])


def raise_flags(flags_at: Tensor, step: Tensor, layer: int, status: Tensor) -> None:
    """Every flag whose address is not 0 to the layer's mark, unless the status is set."""
    for address in flags_at.tolist():
        if address and not int(status):
            ctypes.c_int64.from_address(address).value = _mark(step, layer)


def behind(flags_at: Tensor, step: Tensor, layer: int) -> list[int]:
    """Which entries of the table have a flag that is not at the layer's mark."""
    flags = ((at, address) for at, address in enumerate(flags_at.tolist()) if address)
    return [at for at, address in flags if ctypes.c_int64.from_address(address).value < _mark(step, layer)]


def await_flags(flags_at: Tensor, step: Tensor, layer: int, abort: Tensor, status: Tensor) -> bool:
    """One look of the wait: whether it is over, for whatever reason."""
    if int(status) or not behind(flags_at, step, layer):
        return True
    if int(abort) >= POISON:
        status.fill_(1)
    return bool(int(status))


def direct_merge(q: Tensor, k: Tensor, v: Tensor, o_at: Tensor, lse_at: Tensor, scale: float) -> Tensor:
    """float64 [T, H, D]: `reference.decode_merge` of what lies at o_at, lse_at [P, T]; 0 for no part."""
    o = torch.zeros(len(o_at), *q.shape, dtype=torch.float64)
    lse = torch.full(o.shape[:3], -torch.inf, dtype=torch.float64)
    for part, (o_row, lse_row) in enumerate(zip(o_at.tolist(), lse_at.tolist(), strict=True)):
        for token, (o_address, lse_address) in enumerate(zip(o_row, lse_row, strict=True)):
            if lse_address:
                o[part, token] = at_address(o_address, tuple(q.shape[1:]), q.dtype)
                lse[part, token] = at_address(lse_address, (q.shape[1],), torch.float32)
    return reference.decode_merge(q, k, v, o, lse, scale)


def _mark(step: Tensor, layer: int) -> int:
    return (int(step) << LAYER_BITS) + layer + 1
