"""bench/gpu_layer.py on a simulated device: it measures nothing, but runs."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from simulated_device import SimulatedDevice
from step_fakes import ReferenceOps

BENCH = Path(__file__).parents[3] / "bench"


@pytest.fixture
def bench(monkeypatch):
    for name in ("gpu_step", "gpu_layer"):
        spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    monkeypatch.setattr(module, "REPLAYS", 2)
    return module


@pytest.fixture
def found(bench):
    step = sys.modules["gpu_step"]
    problem = step.Problem(step.model("tiny", 0, 40), torch.float32, batch=3, context=40)
    with torch.inference_mode():
        return list(bench.measure(SimulatedDevice(), ReferenceOps(), problem))


def test_the_phases_read_every_weight_of_the_step_once(bench, found):
    *phases, whole = found
    layers = 2
    assert sum(each.weight_bytes * (1 if each.per_step else layers) for each in phases) == whole.weight_bytes


def test_the_table_has_a_line_for_every_phase_and_its_shares_make_the_whole(bench, found):
    found = [bench.Found(each.phase, 1e-5, each.weight_bytes, each.per_step) for each in found[:-1]] + [
        bench.Found("whole", 1e-3, found[-1].weight_bytes, per_step=True)
    ]
    _head, *lines, last = bench.report(found, layers=2, bandwidth=1e9)
    assert len(lines) == len(found)  # `whole` is the last line, and what lies between has one
    shares = [float(line.split()[-1].rstrip("%")) for line in lines]
    assert sum(shares) == pytest.approx(100, abs=1)
    head = next(line for line in lines if "head" in line)
    assert head.split()[-1] == "1.0%" and shares[0] == 2.0, "there is one head, and a phase in each layer"
    assert f"step / least {1e-3 / (found[-1].weight_bytes / 1e9):.3f}" in last
