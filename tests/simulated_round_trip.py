"""`flume_attention.cuda.direct_round_trip` between two simulated devices."""

from __future__ import annotations

import sys
from contextlib import ExitStack

import torch
from flume_attention.cuda import direct_round_trip
from simulated_device import SimulatedDevice

_for_good = ExitStack()


def open_device():
    device = SimulatedDevice()
    _for_good.enter_context(device.running())
    return device


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-4)
    direct_round_trip.open_device = open_device
    direct_round_trip.main("simulated_round_trip")
