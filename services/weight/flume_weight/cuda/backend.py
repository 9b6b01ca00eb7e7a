"""How an engine computes its steps on a GPU: `flume_weight.passes.Backend`.

Decode batches are captured steps, all sizes captured before the node is ready; everything else runs chunk by
chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from flume_common.config_schema import Microbatches
from flume_common.lanes import Port
from flume_common.layout import KvLayout
from flume_kernels.gpu.device import Device
from flume_kernels.gpu.watchdog import Watchdog

from flume_weight.cuda.buckets import Buckets
from flume_weight.cuda.captured_steps import CapturedSteps
from flume_weight.cuda.device_weights import on_device
from flume_weight.cuda.direct_exchange import DirectExchange
from flume_weight.cuda.driver import StepDriver
from flume_weight.cuda.eager import DeviceRangeAttention, EagerForward
from flume_weight.cuda.forward import CapturedForward
from flume_weight.cuda.lane_exchange import LaneExchange
from flume_weight.cuda.microbatching import Microbatching
from flume_weight.cuda.ops import Ops
from flume_weight.cuda.region_mapping import mapped
from flume_weight.errors import ConfigRefused
from flume_weight.model import Transformer
from flume_weight.passes import Passes
from flume_weight.scheduler import StepLimits


class GpuBackend:
    """`ops` run on `device`. `direct`: steps may meet attention nodes in memory that both map."""

    packs = False

    def __init__(
        self, device: Device, ops: Ops, direct: bool = True, microbatches: Microbatches = "auto"
    ) -> None:
        self._device = device
        self._ops = ops
        self._direct = direct
        self._microbatches = microbatches

    @contextmanager
    def passes(
        self, model: Transformer, port: Port, layout: KvLayout, limits: StepLimits, timeout_s: float
    ) -> Iterator[Passes]:
        """The model is copied to the device. Raises ConfigRefused when that has no room for it."""
        with Watchdog() as watchdog:
            try:
                passes = self._make(model, port, layout, limits, StepDriver(watchdog, timeout_s))
            except torch.OutOfMemoryError as error:
                raise ConfigRefused(f"--device cuda: no room for the model and its steps: {error}") from error
            del model  # this copy of it
            yield passes

    def _make(
        self, model: Transformer, port: Port, layout: KvLayout, limits: StepLimits, driver: StepDriver
    ) -> Passes:
        config = model.config
        there = Transformer(config, on_device(model.weights, self._device.name))
        attention = DeviceRangeAttention(port, layout, layout.head_dim**-0.5, driver.timeout_s)
        microbatching = Microbatching(config.num_layers, self._microbatches)
        captured = CapturedForward(
            CapturedSteps(self._device, self._ops, config, there.weights),
            Buckets.up_to(limits.max_sequences), driver, attention, LaneExchange(port, layout), microbatching,
            DirectExchange(port, layout, self._device) if self._direct else None,
        )  # fmt: skip
        captured.prepare()
        map_region = partial(mapped, self._device, layout) if self._direct else None
        return Passes(attention, (captured, EagerForward(there, attention)), microbatching, map_region)


def open_gpu(*, direct: bool, microbatches: Microbatches) -> GpuBackend:
    """On the first GPU that this process sees. Raises ConfigRefused."""
    from flume_kernels.gpu.cuda_device import CudaDevice, DeviceUnusable

    from flume_weight.cuda.ops import TritonOps

    try:
        return GpuBackend(CudaDevice(), TritonOps(), direct, microbatches)
    except DeviceUnusable as error:
        raise ConfigRefused(f"--device cuda: {error}; flumectl doctor says what this machine has") from error
