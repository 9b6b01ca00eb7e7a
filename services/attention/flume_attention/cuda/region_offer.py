"""What an attention node offers a weight node on its host: a region of device memory, and answers there."""

from __future__ import annotations

from dataclasses import dataclass

from flume_common.direct_region import DirectRegion, RegionHandle
from flume_common.lanes.processes import Process
from flume_kernels.gpu.device import Device
from flume_kernels.gpu.watchdog import Watchdog

from flume_attention.cuda.device_pool import DevicePool
from flume_attention.cuda.direct_answers import DirectAnswers
from flume_attention.cuda.direct_steps import DirectSteps
from flume_attention.cuda.lane_region import LaneRegion
from flume_attention.cuda.ops import AttentionOps


@dataclass(frozen=True, slots=True)
class RegionOffer:
    """`answers` keep the region's memory for as long as the lane lasts."""

    handle: bytes  # RegionHandle; empty: there is none
    answers: DirectAnswers | None
    why_not: str = ""


NO_OFFER = RegionOffer(b"", None)


def offer_region(
    device: Device, ops: AttentionOps, pool: DevicePool, rows: int, max_length: int, watchdog: Watchdog
) -> RegionOffer:
    """A region for `rows` rows, with its steps captured. A lane is as good without one: see `why_not`."""
    region = DirectRegion(pool.layout, rows)
    try:
        shared = device.share(region.size_bytes)
        steps = DirectSteps(device, ops, pool, LaneRegion.of(region, shared.memory), max_length)
        steps.prepare()
    except RuntimeError as error:
        return RegionOffer(b"", None, str(error))
    handle = RegionHandle(Process.this().boot, shared.card, rows, shared.handle)
    return RegionOffer(handle.encode(), DirectAnswers(device, steps, watchdog=watchdog))
