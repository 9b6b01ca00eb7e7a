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
    """Room for `num_blocks` blocks of every layer, and one message at a time on its way in or out.

    `memory` is uint8 device memory to use, which keeps what it holds; None: its own. Raises RuntimeError when
    the device has not so much.
    """

    def __init__(
        self,
        device: Device,
        ops: AttentionOps,
        layout: KvLayout,
        num_blocks: int,
        memory: Tensor | None = None,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.ops = ops
        self._device = device
        if memory is None:
            memory = device.tensor(num_blocks * layout.block_bytes, dtype=torch.uint8)
        kv = memory[: num_blocks * layout.block_bytes].view(DTYPES[layout.dtype]).view(
            layout.num_layers, num_blocks, 2, layout.num_kv_heads, layout.block_tokens, layout.head_dim
        )  # fmt: skip
        self.layers = [KvPool(layer) for layer in kv]
        self._message = device.host_tensor(0, dtype=kv.dtype)

    @property
    def where(self) -> torch.device:
        return self.layers[0].kv.device

    def expect(self, message_bytes: int) -> None:
        """Messages may be as large as this. Makes memory where the largest until now was smaller."""
        size = message_bytes // self.layout.itemsize
        if size > len(self._message):
            self._device.wait_beside()
            self._message = self._device.host_tensor(size, dtype=self._message.dtype)

    def load(self) -> None:
        """Put a token nowhere, so that no step waits for the kernel that does it."""
        size = (2, 1, self.layout.num_kv_heads, self.layout.head_dim)
        with self._device.beside():
            k, v = torch.zeros(size, dtype=self._message.dtype, device=self.where)
            self.ops.append(self.layers[0], k, v, torch.tensor([-1]).to(self.where))
        self._device.wait_beside()

    def read(self, first_layer: int, runs: Sequence[Run], out: Tensor) -> None:
        """Copy what lies in `runs`, in order, to out [layers, 2, tokens, kv_heads, head_dim] in host memory.

        Waits for it, and for what was written before; for no step.
        """
        self.expect(out.numel() * out.element_size())
        self._device.wait_beside()
        message = self._message[: out.numel()].view(out.shape)
        with self._device.beside():
            at = torch.tensor(slots(runs), dtype=torch.int64).to(self.where)
            block, offset = at // self.layout.block_tokens, at % self.layout.block_tokens
            for number, target in enumerate(message):
                tokens = self.layers[first_layer + number].kv[block, :, :, offset]
                target.copy_(tokens.transpose(0, 1), non_blocking=True)
        self._device.wait_beside()
        out.copy_(message)

    def write(self, first_layer: int, kv: Tensor, targets: Sequence[Run]) -> None:
        """Queue putting kv [layers, 2, tokens, kv_heads, head_dim], in host memory, where `targets` say.

        It runs beside what the device does; `Device.join` makes later work wait for it. `kv` may be reused at
        once: what is under way is a copy, and only a second write before the first is over waits.
        """
        self.expect(kv.numel() * kv.element_size())
        self._device.wait_beside()
        message = self._message[: kv.numel()].view(kv.shape).copy_(kv)
        to = torch.tensor(slots(targets), dtype=torch.int64)
        with self._device.beside():
            there, to = message.to(self.where, non_blocking=True), to.to(self.where)
            for at, (k, v) in enumerate(there):
                self.ops.append(self.layers[first_layer + at], k, v, to)
