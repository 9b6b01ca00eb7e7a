"""bench/gpu_ready.py on a CPU. On a machine with a GPU: bash bench/gpu_check.sh RESULTS ready"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from flume_attention.messages import Started
from flume_controller.providers import standby


@pytest.fixture
def bench(monkeypatch):
    path = Path(__file__).parents[2] / "bench" / "gpu_ready.py"
    spec = importlib.util.spec_from_file_location("gpu_ready", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_ready", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "configure_logging", lambda *_: None)
    return module


def test_phases_that_follow_one_another_are_told_as_times_since_the_start(bench):
    started = Started(main_at_s=10.02, phases_ms={"device": 110.0, "kv_memory": 40.0, "port": 90.0})
    times = bench.times_of(started, 10.0, 265.0)
    assert {phase: round(ms) for phase, ms in times.items()} == {
        "process": 20, "device": 130, "kv_memory": 170, "port": 260, "told": 265,
    }  # fmt: skip
    line = {"event": "engine_started", "elapsed_ms": 50, "process_ms": 20, "device_ms": 30}
    assert bench.engine_phases(line, 70.0) == {
        "engine: asked for": 20.0, "engine: process": 40.0, "engine: device": 70.0,
    }  # fmt: skip


def test_the_table_has_medians_and_the_worst_and_ready_is_when_all_is_over(bench):
    measured = [{"a": 1.0, "b": 10.0}, {"a": 3.0, "b": 30.0}, {"a": 2.0, "b": 20.0}]
    rows = [line.split() for line in bench.table("x", measured)[2:]]
    assert rows == [["a", "2", "2.0", "3"], ["b", "20", "18.0", "30"]]
    assert bench.ready_ms(measured) == 20.0


def run(bench, monkeypatch, tmp_path, *what):
    out = tmp_path / "ready.json"
    flags = ["--device", "cpu", "--kv-bytes", "64MiB", "--rounds", "1", "--what", *what, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["gpu_ready.py", *flags])
    assert bench.main() == 0
    return json.loads(out.read_text())["rounds"]


@pytest.mark.e2e
def test_engines_are_forked_and_measured(bench, monkeypatch, tmp_path, capsys):
    (times,) = run(bench, monkeypatch, tmp_path, "engine")["engine"]
    assert [*times] == ["process", "port", "told"] and sorted(times.values()) == [*times.values()]
    assert "engine, 1 rounds" in capsys.readouterr().out


@pytest.mark.soak
def test_nodes_and_standbys_are_measured_to_ready(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(standby, "PAUSE_S", 0.1)
    found = run(bench, monkeypatch, tmp_path, "node", "standby")
    (node,), (called,) = found["node"], found["standby"]
    assert {"imported", "registered", "engine: port", "READY"} <= node.keys()
    assert {"called", "READY"} <= called.keys() and "imported" not in called
    assert called["READY"] < node["READY"]
