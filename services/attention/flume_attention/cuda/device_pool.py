"""The memory of a node's keys and values on a GPU, laid out as `flume_kernels.gpu.kv_pool` describes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from flume_common.layout import KvLayout
from flume_kernels.dtypes import DTYPES
from flume_kernels.gpu.device import Device
from flume_kernels.gpu.kv_pool import KvPool
from torch import Tensor

from flume_attention.cuda.ops import AttentionOps
from flume_attention.cuda.paging import slots
from flume_attention.ranges import Run


class DevicePool:
    """Room for `num_blocks` blocks of every layer, and one message of `message_bytes` on its way there."""

    def __init__(
        self, device: Device, ops: AttentionOps, layout: KvLayout, num_blocks: int, message_bytes: int
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self._device = device
        self._ops = ops
        kv = device.tensor(
            layout.num_layers, num_blocks, 2, layout.num_kv_heads, layout.block_tokens, layout.head_dim,
            dtype=DTYPES[layout.dtype],
        )  # fmt: skip
        self.layers = [KvPool(layer) for layer in kv]
        self._message = device.host_tensor(message_bytes // layout.itemsize, dtype=kv.dtype)

    @property
    def where(self) -> torch.device:
        return self.layers[0].kv.device

    def write(self, first_layer: int, kv: Tensor, targets: Sequence[Run]) -> None:
        """Queue putting kv [layers, 2, tokens, kv_heads, head_dim], in host memory, where `targets` say.

        It runs beside what the device does; `Device.join` makes later work wait for it. `kv` may be reused at
        once: what is under way is a copy, and only a second write before the first is over waits.
        """
        self._device.wait_beside()
        message = self._message[: kv.numel()].view(kv.shape).copy_(kv)
        to = torch.tensor(slots(targets), dtype=torch.int64)
        with self._device.beside():
            there, to = message.to(self.where, non_blocking=True), to.to(self.where)
            for at, (k, v) in enumerate(there):
                self._ops.append(self.layers[first_layer + at], k, v, to)
