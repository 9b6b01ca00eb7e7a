"""A direct lane's region as this process sees it: device memory of an attention node, mapped here."""

from __future__ import annotations

from dataclasses import dataclass

from flume_common.direct_region import DirectRegion
from torch import Tensor


@dataclass(frozen=True, slots=True)
class MappedRegion:
    """`memory`: all of the region, uint8 [at least size_bytes] on our device; mapped for as long as it lives.

    Dropped after its lane is closed, when no step runs.
    """

    region: DirectRegion
    memory: Tensor

    @property
    def address(self) -> int:
        """Of the region's first byte, in our address space."""
        return self.memory.data_ptr()
