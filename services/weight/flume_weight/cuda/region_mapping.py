"""A region that an attention node on this host offers, mapped for our device."""

from __future__ import annotations

import msgspec
from flume_common.direct_region import DirectRegion, RegionHandle
from flume_common.layout import KvLayout
from flume_kernels.gpu.device import Device
from flume_kernels.gpu.shared_memory import MappingFailed

from flume_weight.mapped_region import MappedRegion


def mapped(device: Device, layout: KvLayout, encoded: bytes) -> MappedRegion:
    """From a RegionHandle for a lane of this layout. Raises MappingFailed."""
    try:
        handle = RegionHandle.decode(encoded)
    except msgspec.MsgspecError as error:
        raise MappingFailed(f"not the handle of a region: {error}") from error
    region = DirectRegion(layout, handle.rows)
    memory = device.map(handle.gpu, handle.handle)
    if memory.numel() < region.size_bytes:
        raise MappingFailed(f"{memory.numel()} bytes are no region for {handle.rows} rows of this model")
    return MappedRegion(region, memory)
