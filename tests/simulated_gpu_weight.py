"""A weight engine whose GPU is simulated, and whose model is small and random.

python -m simulated_gpu_weight --device cuda --dtype float32 …
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

import torch
from flume_weight import engine_process
from flume_weight.cuda import backend
from flume_weight.model import Transformer
from simulated_device import SimulatedDevice
from step_fakes import ReferenceOps, random_weights, small_config

CONFIG = small_config(context_tokens=512)
_for_good = ExitStack()


def model(*_, **__):
    return Transformer(CONFIG, random_weights(CONFIG))


def open_gpu(*, direct, microbatches):
    device = SimulatedDevice()
    _for_good.enter_context(device.running())
    return backend.GpuBackend(device, ReferenceOps(), direct, microbatches)


def main():
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-4)  # the engine polls, and its device is a thread of the same process here
    engine_process.load_model = model
    backend.open_gpu = open_gpu
    return engine_process.main()


if __name__ == "__main__":
    sys.exit(main())
