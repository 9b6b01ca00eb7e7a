"""What an engine's memory and lanes are made of on a GPU: `flume_attention.backend.Backend`.

Memory for KV is taken when the engine starts, before there is a layout: a node that is READY has it. Lanes'
frames lie in host memory that the device reads and writes; each lane has a stream, its captured steps and a
watchdog. All of that is made when the lane is, so that no step waits for a capture.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from flume_common.lanes import Lane
from flume_common.lanes.frames import Bytes, Rings
from flume_common.layout import KvLayout
from flume_common.pull_wire import CHUNK_BYTES
from flume_common.wire import LaneShape
from flume_kernels.gpu.device import Device, Flags
from flume_kernels.gpu.watchdog import Watchdog
from torch import Tensor

from flume_attention.cuda.answers import Answers
from flume_attention.cuda.device_pool import DevicePool
from flume_attention.cuda.ops import AttentionOps
from flume_attention.cuda.region_offer import NO_OFFER, offer_region
from flume_attention.cuda.session import RINGS, GpuLaneSession, lane_buffers
from flume_attention.errors import ConfigRefused
from flume_attention.frame_tensors import FrameTensors
from flume_attention.holdings import Holdings
from flume_attention.lane_session import LaneSession
from flume_attention.node import Node

# Block tables go to the device with every step, as long as the longest row could be: 2 MiB at 64 rows.
MOST_CAPTURED_TOKENS = 128 << 10
# What an engine held that was killed just now is free a little later.
FREED_WITHIN_S = 3.0
_LOOK_EVERY_S = 0.1


class GpuBackend:
    """`make_ops` gives the kernels for a layout. Raises ValueError for one that they cannot compute with."""

    rings: Rings = RINGS
    compiles = True

    def __init__(self, device: Device, make_ops: Callable[[KvLayout, Device], AttentionOps]) -> None:
        self._device = device
        self._make_ops = make_ops
        self._memory: Tensor | None = None

    def reserve(self, kv_bytes: int) -> None:
        """Take the memory that `pool` cuts up. Raises ConfigRefused where there is not so much."""
        until = time.monotonic() + FREED_WITHIN_S
        while self._memory is None:
            try:
                self._memory = self._device.tensor(kv_bytes, dtype=torch.uint8)
            except torch.OutOfMemoryError as error:
                if time.monotonic() > until:
                    raise ConfigRefused(f"--kv-memory: no {kv_bytes} bytes on the GPU: {error}") from error
                time.sleep(_LOOK_EVERY_S)

    def warm_up(self) -> None:
        """Run the kernels that every step has: libraries are loaded then."""
        flags = Flags(self._device, gates=1, signals=1)
        flags.host.open_wide()

        def run() -> None:
            self._device.await_(flags, 0)
            self._device.signal(flags, 1)

        self._device.warm_up(run)

    def pool(self, layout: KvLayout, num_blocks: int) -> DevicePool:
        ops = self._make_ops(layout, self._device)
        pool = DevicePool(self._device, ops, layout, num_blocks, self._memory)
        pool.expect(CHUNK_BYTES)
        return pool

    def allocate(self, size_bytes: int) -> Bytes:
        frames: Bytes = self._device.host_tensor(size_bytes, dtype=torch.uint8).numpy()
        return frames

    def session(
        self,
        node: Node,
        weight_node: str,
        epoch: int,
        lane: Lane[LaneShape],
        holdings: Holdings,
        *,
        direct: bool = False,
        **options: Any,
    ) -> LaneSession:
        """Raises DeviceStuck."""
        pool, shape = node.pool, lane.shape
        assert isinstance(pool, DevicePool)
        pool.expect(shape.kv_frame_bytes)
        device = self._device.with_stream()
        watchdog = Watchdog()
        ops = self._make_ops(shape.layout, device)
        max_rows = min(shape.max_step_sequences, shape.max_step_tokens)
        max_length = min(pool.num_blocks * shape.layout.block_tokens, MOST_CAPTURED_TOKENS)
        answers = Answers(
            device, ops, pool, lane_buffers(FrameTensors(shape.layout), lane, shape.max_step_tokens),
            max_rows=max_rows, max_length=max_length, watchdog=watchdog,
        )  # fmt: skip
        answers.prepare()
        offer = NO_OFFER
        if direct:
            offer = offer_region(device, ops, pool, max_rows, max_length, watchdog)
        watchdog.start()
        session = GpuLaneSession(
            node, weight_node, epoch, lane, holdings, answers=answers, direct=offer.answers, **options
        )
        session.region, session.no_region = offer.handle, offer.why_not
        return session


def open_gpu() -> GpuBackend:
    """On the first GPU that this process sees. Raises ConfigRefused."""
    from flume_kernels.gpu.cuda_device import CudaDevice, DeviceUnusable

    try:
        return GpuBackend(CudaDevice(), _triton)
    except DeviceUnusable as error:
        raise ConfigRefused(f"--device cuda: {error}; flumectl doctor says what this machine has") from error


def _triton(layout: KvLayout, device: Device) -> AttentionOps:
    from flume_attention.cuda.ops import TritonAttention

    return TritonAttention(layout, device.name)
