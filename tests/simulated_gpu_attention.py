"""An attention engine whose GPU is simulated: a process like the real one, but for the device it opens.

    python -m simulated_gpu_attention --device cuda …

SIMULATED_STUCK in the environment: the device never does what it was given. SIMULATED_DRAIN_S: how long a
step that was released may take to end. SIMULATED_COMPILE_S: how long it takes to prepare the first lane. Exit
code 1: something was left on the device.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack

import torch
from flume_attention import engine
from flume_attention.cuda import answers, backend
from reference_attention import ReferenceAttention
from simulated_device import SimulatedDevice

_for_good = ExitStack()
_devices = []


def open_gpu():
    device = SimulatedDevice()
    _devices.append(device)
    if "SIMULATED_STUCK" in os.environ:
        SimulatedDevice.move_on = lambda device: None
    else:
        _for_good.enter_context(device.running())
    return backend.GpuBackend(device, lambda layout, device: ReferenceAttention(device))


class _Compiling(answers.Answers):
    """Kernels that the first lane of the process has to have compiled."""

    left_s = float(os.environ.get("SIMULATED_COMPILE_S", 0))

    def prepare(self):
        time.sleep(_Compiling.left_s)
        _Compiling.left_s = 0
        super().prepare()


def main():
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-4)  # the engine polls, and its device is a thread of the same process here
    backend.open_gpu = open_gpu
    backend.Answers = _Compiling
    answers.DRAIN_TIMEOUT_S = float(os.environ.get("SIMULATED_DRAIN_S", answers.DRAIN_TIMEOUT_S))
    engine.main()
    left = sum(len(stream.queue) for device in _devices for stream in device._streams.all)
    return f"{left} operations were left on the device" if left else None


if __name__ == "__main__":
    sys.exit(main())
