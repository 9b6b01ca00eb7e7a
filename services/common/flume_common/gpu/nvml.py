"""The NVIDIA cards of this machine, as the driver's management library tells: no CUDA context is made.

Calls follow NVML's C interface (nvml.h); a function that an older driver lacks leaves its field unknown.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
NAME_BYTES = 96


class NvmlUnavailable(Exception):
    """There is no driver, or it does not answer."""


@dataclass(frozen=True, slots=True)
class Gpu:
    index: int
    name: str
    uuid: str
    memory_bytes: int
    memory_used_bytes: int
    compute_capability: str  # "9.0"
    mig: bool | None  # cut into instances; None where the card does not know of it


@dataclass(frozen=True, slots=True)
class Driver:
    version: str
    cuda: str  # the newest CUDA it runs, "12.8"
    gpus: tuple[Gpu, ...]


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def look(library: str = LIBRARY) -> Driver:
    """Raises NvmlUnavailable."""
    try:
        nvml = ctypes.CDLL(library)
    except OSError as error:
        raise NvmlUnavailable(f"no NVIDIA driver ({library} cannot be loaded)") from error
    with _initialised(nvml):
        count = ctypes.c_uint()
        _call(nvml, "nvmlDeviceGetCount_v2", ctypes.byref(count))
        cuda = ctypes.c_int()
        _call(nvml, "nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(cuda))
        return Driver(
            version=_text(nvml, "nvmlSystemGetDriverVersion"),
            cuda=f"{cuda.value // 1000}.{cuda.value % 1000 // 10}",
            gpus=tuple(_gpu(nvml, index) for index in range(count.value)),
        )


@contextmanager
def _initialised(nvml: ctypes.CDLL) -> Iterator[None]:
    _call(nvml, "nvmlInit_v2")
    try:
        yield
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: ctypes.CDLL, index: int) -> Gpu:
    handle = ctypes.c_void_p()
    _call(nvml, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
    memory = _Memory()
    _call(nvml, "nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call(nvml, "nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
    return Gpu(
        index=index,
        name=_text(nvml, "nvmlDeviceGetName", handle),
        uuid=_text(nvml, "nvmlDeviceGetUUID", handle),
        memory_bytes=memory.total,
        memory_used_bytes=memory.used,
        compute_capability=f"{major.value}.{minor.value}",
        mig=_mig(nvml, handle),
    )


def _mig(nvml: ctypes.CDLL, handle: ctypes.c_void_p) -> bool | None:
    now, after = ctypes.c_uint(), ctypes.c_uint()
    try:
        _call(nvml, "nvmlDeviceGetMigMode", handle, ctypes.byref(now), ctypes.byref(after))
    except NvmlUnavailable:
        return None
    return bool(now.value)


def _text(nvml: ctypes.CDLL, function: str, *arguments: Any) -> str:
    buffer = ctypes.create_string_buffer(NAME_BYTES)
    _call(nvml, function, *arguments, buffer, ctypes.c_uint(NAME_BYTES))
    return buffer.value.decode(errors="replace")


def _call(nvml: ctypes.CDLL, function: str, *arguments: Any) -> None:
    try:
        status = getattr(nvml, function)(*arguments)
    except AttributeError as error:
        raise NvmlUnavailable(f"the driver has no {function}") from error
    if status:
        raise NvmlUnavailable(f"{function} failed with NVML status {status}")
