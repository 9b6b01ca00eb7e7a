"""bench/gpu_growth.py with all nodes in this process, on simulated devices: it measures nothing, but runs."""

import sys
import threading
from contextlib import ExitStack
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from gpu_node import ON_GPU
from reference_attention import ReferenceAttention
from simulated_device import SimulatedDevice
from step_fakes import ReferenceOps


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "bench"))
    import gpu_growth

    yield gpu_growth
    for name in ("gpu_growth", "gpu_step"):
        sys.modules.pop(name, None)


@pytest.fixture
def problem(bench):
    step = sys.modules["gpu_step"]
    config = step.model("tiny", 0, 200)
    return step.Problem(config, torch.float32, batch=2, context=40, steps=3, warm_up=1, layers_per_memory=2)


@pytest.mark.skipif(ON_GPU, reason="bench/gpu_check.sh runs it for real")
def test_nodes_join_one_by_one_and_contexts_grow_by_what_each_of_them_holds(bench, problem, monkeypatch):
    asked, threads = [], []
    exchange = bench.Growing._exchange

    def noted(growing, peer, context):
        found = exchange(growing, peer, context)
        asked.append((peer.node, found.rows[0][2], found.rows[0][3], context))
        return found

    monkeypatch.setattr(bench.Growing, "_exchange", noted)
    with ExitStack() as stack:

        def start(node, lane):
            ours, theirs = Pipe()
            device = SimulatedDevice()
            stack.enter_context(device.running())
            args = node, device, ReferenceAttention(device), theirs, lane
            threads.append(threading.Thread(target=sys.modules["gpu_step"].attention_node, args=args))
            threads[-1].start()
            return ours

        device = SimulatedDevice()
        stack.enter_context(device.running())
        found = bench.grow(problem, 2, device, ReferenceOps(), start)
        for thread in threads:
            thread.join(20)
    assert [(stage.nodes, stage.context) for stage in found] == [(1, 42), (2, 82)]
    assert all(0 < stage.p50 <= stage.p99 <= stage.worst for stage in found)
    assert device.captures == 2  # of one size, for both ways
    first, second = "attention-1", "attention-2"
    assert asked[:2] == [(first, 1, 40, 40), (first, 1, 41, 41)]
    assert asked[-2:] == [(first, 0, 44, 83), (second, 1, 39, 83)]


def test_the_models_add_keys_to_what_the_same_nodes_take_without_any(bench):
    def stages(*p50s, contexts):
        return [
            bench.Stage(n + 1, c, p50, p50, p50)
            for n, (p50, c) in enumerate(zip(p50s, contexts, strict=True))
        ]

    base, found = stages(4.0, 4.4, contexts=[16, 32]), stages(12.0, 20.5, contexts=[8016, 16032])
    rows = bench.predict(base, found, row_token_bytes=1_000_000, bandwidth=1e12)
    assert [row.this_card for row in rows] == pytest.approx([4.0 + 8.0, 4.4 + 16.0])
    assert [row.own_cards for row in rows] == pytest.approx([12.0, 12.4])
    *_, limit, flat = bench.table(rows)
    assert "12.00 ms" in limit and limit.endswith("met") and flat.endswith("met")
    slow = bench.predict(stages(4.0, 6.4, contexts=[16, 32]), found, 1_000_000, 1e12)
    assert bench.table(slow)[-1].endswith("1.200 of the first stage, at most 1.15: MISSED")


@pytest.mark.parametrize("count, place", [(1, 0), (99, 98), (100, 98), (300, 296)])
def test_one_in_a_hundred_is_slower_than_p99(bench, count, place):
    assert bench.p99(list(range(count))[::-1]) == place
