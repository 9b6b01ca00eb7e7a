"""`simulated_gpu_attention`, telling what its process did besides, into the file that TOLD_FILE names: what
it imported, which programs it ran, whether it was forked from one that had CUDA's driver loaded.

Before it serves it goes the way of a real GPU's engine as far as that leads without one.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path


def main():
    before, ran = set(sys.modules), []
    driver_loaded = "libcuda.so" in Path("/proc/self/maps").read_text()
    sys.addaudithook(lambda event, values: ran.append(values[1]) if event == "subprocess.Popen" else None)
    import simulated_gpu_attention
    import torch

    if not torch.cuda.is_available():
        _open()
        _launch()
    try:
        return simulated_gpu_attention.main()
    finally:
        told = {"imported": sorted(set(sys.modules) - before), "ran": ran, "driver_loaded": driver_loaded}
        Path(os.environ["TOLD_FILE"]).write_text(json.dumps(told))


def _open():
    import torch
    from flume_attention.cuda import backend, ops
    from flume_attention.errors import ConfigRefused
    from flume_common.layout import KvLayout

    with suppress(ConfigRefused):
        backend.open_gpu()
    ops.TritonAttention(KvLayout(3, 4, 2, 64, "float32", 16), torch.device("cpu"))


def _launch():
    """Up to where a device would be asked to load the kernels."""
    import torch
    from flume_kernels.gpu import signals
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    class NoDevice:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    assert driver._active is None, "the real one is asked for by whoever comes first"
    driver.set_active(NoDevice())
    JITFunction.__getitem__ = lambda self, grid: lambda *a, **k: self.run(*a, grid=grid, warmup=True, **k)
    words, counters = torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    status = torch.zeros(1, dtype=torch.int64)
    signals.await_(words[0, :1], counters[0:1], status)
    signals.signal(words[1, :1], counters[1:2], status)
