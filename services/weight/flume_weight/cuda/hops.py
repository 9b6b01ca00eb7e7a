"""How a captured step asks attention nodes and takes their answers.

    FramesHop   through the step's host buffers; the host carries messages between them and lanes
    DirectHop   in the nodes' own device memory, with no host in between: `flume_common.direct_region`

Both give the host one signal a layer when the queries have left, by which it knows how far the step is.
"""

from __future__ import annotations

from typing import Protocol

import torch
from flume_kernels.gpu.device import Device
from torch import Tensor

from flume_weight.cuda.direct_tables import DirectTables
from flume_weight.cuda.ops import Angles, Ops
from flume_weight.cuda.step_buffers import StepBuffers


class Hop(Protocol):
    """Queues on the current stream, per layer and microbatch."""

    def begin(self, where: torch.device) -> None:
        """Before a step's first layer."""

    def ask(self, microbatch: int, layer: int, q: Tensor, positions: Tensor) -> Tensor:
        """q [b, heads, head_dim] leaves, turned to its positions [b], with a signal; returned turned."""
        ...

    def answer(self, microbatch: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of these to themselves and to all that was asked, [b, heads, head_dim]; waits for it."""
        ...


def hop_of(device: Device, ops: Ops, angles: Angles, buffers: StepBuffers) -> Hop:
    """The one that these buffers are for."""
    if buffers.direct is None:
        return FramesHop(device, ops, angles, buffers)
    return DirectHop(device, ops, angles, buffers, buffers.direct)


class FramesHop:
    def __init__(self, device: Device, ops: Ops, angles: Angles, buffers: StepBuffers) -> None:
        self._device = device
        self._ops = ops
        self._angles = angles
        self._buffers = buffers

    def begin(self, where: torch.device) -> None:
        pass

    def ask(self, microbatch: int, layer: int, q: Tensor, positions: Tensor) -> Tensor:
        # Here, too, for the merge: reading it back from host memory would cost more.
        turned = torch.empty_like(q)
        self._ops.rope(q, positions, self._angles, turned, self._buffers.microbatches[microbatch].queries)
        self._device.signal(self._buffers.flags, self._buffers.signal_of(microbatch))
        return turned

    def answer(self, microbatch: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        buffers = self._buffers.microbatches[microbatch]
        self._device.await_(self._buffers.flags, microbatch)
        return self._ops.merge(q, k, v, buffers.part_o, buffers.part_lse, q.shape[-1] ** -0.5)


class DirectHop:
    """Of one microbatch: a region has one flag each way."""

    def __init__(
        self, device: Device, ops: Ops, angles: Angles, buffers: StepBuffers, tables: DirectTables
    ) -> None:
        self._device = device
        self._ops = ops
        self._angles = angles
        self._buffers = buffers
        self._in_host_memory = tables
        self._tables = tables

    def begin(self, where: torch.device) -> None:
        self._tables = self._in_host_memory.to(where)

    def ask(self, microbatch: int, layer: int, q: Tensor, positions: Tensor) -> Tensor:
        turned, tables = torch.empty_like(q), self._tables
        self._ops.rope(q, positions, self._angles, turned, addresses=tables.queries_at)
        signal = self._buffers.signal_of(microbatch)
        self._device.raise_flags(self._buffers.flags, tables.asked_at, tables.step, layer, signal)
        return turned

    def answer(self, microbatch: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tables = self._tables
        self._device.await_flags(self._buffers.flags, tables.answered_at, tables.step, layer)
        return self._ops.direct_merge(q, k, v, tables.o_at, tables.lse_at, q.shape[-1] ** -0.5)
