"""The card that a process started here would compute on.

* NoGpu   there is none; says why, and what to do
"""

from __future__ import annotations

import os
from collections.abc import Callable

from flume_common.gpu import nvml

REMEDY = "use --device cpu; flumectl doctor --device cuda says what is missing"


class NoGpu(Exception):
    def __init__(self, why: str) -> None:
        super().__init__(f"--device cuda: no GPU can be used: {why}; {REMEDY}")


def visible_gpu(look: Callable[[], nvml.Driver] | None = None) -> nvml.Gpu:
    """What torch calls "cuda:0". Raises NoGpu.

    CUDA_VISIBLE_DEVICES may name it by index or UUID; of MIG instances the driver's list says too little.
    """
    try:
        driver = (look or nvml.look)()
    except nvml.NvmlUnavailable as error:
        raise NoGpu(str(error)) from error
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    for gpu in driver.gpus:
        if names is None or _names(names.split(",")[0].strip(), gpu):
            return gpu
    where = "" if names is None else f" under CUDA_VISIBLE_DEVICES={names!r}"
    raise NoGpu(f"the driver shows none{where}")


def _names(name: str, gpu: nvml.Gpu) -> bool:
    return name == str(gpu.index) or (name.startswith("GPU-") and gpu.uuid.startswith(name))
