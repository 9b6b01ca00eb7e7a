"""bench/gpu_step.py with both ends in this process, on simulated devices: it measures nothing, but runs."""

import importlib.util
import sys
import threading
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from gpu_node import ON_GPU
from reference_attention import ReferenceAttention
from simulated_device import SimulatedDevice
from step_fakes import ReferenceOps

CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch):
    path = Path(__file__).parents[3] / "bench" / "gpu_step.py"
    spec = importlib.util.spec_from_file_location("gpu_step", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_step", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def problem(bench):
    config = bench.model("tiny", 0, 40)
    return bench.Problem(config, torch.float32, batch=4, context=40, steps=2, warm_up=1, microbatches=2)


def test_one_process_attends_in_its_own_graph(bench, problem):
    device = SimulatedDevice()
    found = bench.one_process(problem, device, ReferenceOps(), ReferenceAttention(device))
    assert found["step"] > 0 and device.captures == 1


@pytest.mark.skipif(ON_GPU, reason="bench/gpu_check.sh runs it for real")
def test_two_nodes_decode_with_one_capture_each_for_a_step_whole_in_halves_and_direct(bench, problem):
    here, there = Pipe()
    device, ops = SimulatedDevice(), None
    ops = ReferenceAttention(device)
    other = threading.Thread(target=bench.attention_node, args=(problem, device, ops, there))
    weight_device = SimulatedDevice()
    with device.running(), weight_device.running():
        other.start()
        found = bench.weight_node(problem, weight_device, ReferenceOps(), CPU, here)
        other.join(20)
    assert 0 < found["split"]["attention"] <= found["split"]["step"]
    assert found["direct"]["step"] > 0
    assert min(found["halves"]["step"], found["halves"]["predicted"]) > 0
