"""How much memory a node may fill with KV: `--kv-memory` as bytes."""

from __future__ import annotations

from collections.abc import Callable

from flume_common import host_memory
from flume_common.gpu import nvml
from flume_common.gpu.visible import NoGpu, visible_gpu
from flume_common.host_memory import Memory, measure

from flume_attention.errors import ConfigRefused

__all__ = ["Memory", "kv_bytes", "measure", "measure_gpu"]


def measure_gpu(look: Callable[[], nvml.Driver] | None = None) -> Memory:
    """Of the first card that this process sees, other processes' share taken off. Raises ConfigRefused."""
    try:
        gpu = visible_gpu(look)
    except NoGpu as error:
        raise ConfigRefused(str(error)) from error
    return Memory(gpu.memory_bytes, gpu.memory_bytes - gpu.memory_used_bytes)


def kv_bytes(text: str, memory: Memory) -> int:
    """As `host_memory.kv_bytes`. Raises ConfigRefused where that raises ValueError."""
    try:
        return host_memory.kv_bytes(text, memory)
    except ValueError as error:
        raise ConfigRefused(str(error)) from error
