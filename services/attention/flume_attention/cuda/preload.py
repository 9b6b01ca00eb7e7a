"""What an engine on a GPU imports and compiles, ahead of it: for the zygote it is forked from.

Nothing here opens a device: a process that did could fork no engine.
"""

from __future__ import annotations

import time

import structlog
from flume_common.gpu.visible import NoGpu, visible_gpu
from flume_kernels.gpu import cuda_device
from flume_kernels.gpu.preload import preload as preload_kernels

from flume_attention.cuda import backend, ops

log = structlog.get_logger()

__all__ = ["backend", "cuda_device", "ops", "preload"]

USUAL_CAPABILITY = 90  # Hopper's


def preload() -> None:
    """Where it fails that is said, and engines do it themselves: they take longer to start, and run."""
    began_s = time.monotonic()
    capability = _capability()
    try:
        preload_kernels(capability)
    except Exception as error:
        log.warning("not_preloaded", reason=f"{type(error).__name__}: {error}")
        return
    elapsed_ms = round(1e3 * (time.monotonic() - began_s))
    log.info("preloaded", compute_capability=capability, elapsed_ms=elapsed_ms)


def _capability() -> int:
    """Of the card that engines see, 90 for 9.0, as the driver's management library says."""
    try:
        return int(visible_gpu().compute_capability.replace(".", ""))
    except NoGpu as error:
        log.warning("no_gpu_to_preload_for", reason=str(error))
        return USUAL_CAPABILITY
