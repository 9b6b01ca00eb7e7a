"""Device memory that another process of the same host maps: CUDA's IPC, the way torch does it.

* MappingFailed   the memory cannot be reached from this process, or not as flags need it; says why

Who makes it and who maps it may end in any order, in any way. A mapping stays valid when its maker is killed:
the driver frees memory when the last process that has it is gone. What the maker drops is not given to
anything else while another process has it mapped: torch counts mappings in shared memory. One that was killed
is never counted off, so its region stays with the maker, which is a few MiB for each peer that died.

Nothing here waits for a peer, and a graph that waits in this memory has to be released before it is dropped.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

_NATIVE_ATOMIC_SUPPORTED = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED


class MappingFailed(Exception):
    """Nothing is mapped."""


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """Zeroed device memory, uint8, and what another process maps it by. It lasts as long as `memory`."""

    memory: Tensor
    card: str  # UUID, as nvidia-smi -L says it
    handle: bytes


class _Handle(msgspec.Struct, frozen=True, array_like=True):
    """What torch's `_share_cuda_` gives, but for the maker's number of its card: others count otherwise."""

    memory: bytes
    size_bytes: int
    offset_bytes: int
    references: bytes
    references_at: int
    event: bytes
    awaits_event: bool


def share(memory: Tensor) -> SharedMemory:
    """Let others map this tensor, all of its storage. Raises RuntimeError where CUDA cannot."""
    _, *words = memory.untyped_storage()._share_cuda_()
    return SharedMemory(memory, card_of(memory.device), msgspec.msgpack.encode(_Handle(*words)))


def map_shared(device: torch.device, card: str, handle: bytes) -> Tensor:
    """Another process's memory on `card`, uint8, for kernels on `device`. Raises MappingFailed."""
    _require_reach(device, card)
    try:
        words = msgspec.structs.astuple(msgspec.msgpack.decode(handle, type=_Handle))
        # Opened for the card whose kernels use it, which gives it access to a peer's memory, too.
        storage = torch.UntypedStorage._new_shared_cuda(device.index, *words)
    except (RuntimeError, msgspec.MsgspecError) as error:
        raise MappingFailed(f"{card}: {error}") from error
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def card_of(device: torch.device | int) -> str:
    """The UUID of a CUDA device."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _require_reach(device: torch.device, card: str) -> None:
    theirs = next((at for at in range(torch.cuda.device_count()) if card_of(at) == card), None)
    if theirs is None:
        raise MappingFailed(f"the card {card} is not visible to this process")
    if theirs != device.index and not _takes_atomics(device.index, theirs):
        raise MappingFailed(f"{device} has no atomic operations in the memory of {card}: it takes NVLink")


def _takes_atomics(ours: int, theirs: int) -> bool:
    """Whether one card's atomic operations work in the memory of another: flags are raised by them."""
    value = ctypes.c_int()
    driver = ctypes.CDLL("libcuda.so.1")
    failed = driver.cuDeviceGetP2PAttribute(ctypes.byref(value), _NATIVE_ATOMIC_SUPPORTED, ours, theirs)
    return not failed and bool(value.value)
