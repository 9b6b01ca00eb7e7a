"""Prefill steps that last a minute: nothing is restarted or sent again, and what goes on can be seen."""

from __future__ import annotations

import re
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from clusters import running
from streams import Stream

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
LAYER_S = 2.0
STEP_S = 30 * LAYER_S


@pytest.fixture
def slow_cluster(tmp_path, monkeypatch):
    """Each layer of a step with prompt tokens lasts two seconds longer."""
    monkeypatch.setenv("FLUME_FAULT_PREFILL_LAYER_DELAY_MS", str(1000 * LAYER_S))
    with running(tmp_path, "--attention", "1", "--timeout", "300") as cluster:
        yield cluster


def engines(cluster):
    """The weight engine's process, by its supervisor."""
    return {
        node.id: {
            child.pid
            for child in psutil.Process(node.pid).children()
            if "engine" in " ".join(child.cmdline())
        }
        for node in cluster.nodes("weight")
    }


def log_of(cluster):
    return "\n".join(path.read_text(errors="replace") for path in cluster.data_dir.rglob("*.log"))


def test_a_minute_in_one_step_is_work(slow_cluster):
    cluster = slow_cluster
    before = engines(cluster)
    assert all(before.values())
    beside = Stream(cluster.router(), "Once upon a time", 3000, timeout_s=400)
    beside.wait_for(5)
    long = Stream(cluster.router(), "lorem ipsum " * 25, 1, timeout_s=400)
    cluster.until(lambda: "PREFILLING" in {item.state for item in cluster.requests()}, 30, "its first step")
    came = len(beside.pieces)
    watched = Watch(cluster)
    short = Stream(cluster.router(), "Hello", 2, timeout_s=400)
    long.result()
    while_it_ran = len(beside.pieces) - came
    short.result()
    watched.stop()

    assert engines(cluster) == before
    assert not re.search(
        "engine_silent|engine_died|weight_node_silent|sequence_interrupted|lane_lost", log_of(cluster)
    )
    assert set(watched.ready) == {200} and max(watched.took_s) < 5.0
    lines = [line for text in watched.status for line in text.splitlines() if line.startswith("  weight-1: ")]
    steps = [re.search(r"step (\d+) for (?:(\d+)m)?(?:(\d+)s)?, layer (\d+) of 30", line) for line in lines]
    lasted = [60 * int(step[2] or 0) + int(step[3] or 0) for step in steps if step]
    assert max(lasted) > 0.8 * STEP_S, lines
    assert len({step[4] for step in steps if step}) > 10, "layer by layer"
    assert any("prefills 1, decodes 1, queued 1" in line and "prompt tokens" in line for line in lines), lines
    assert watched.requests.keys() >= {"PREFILLING", "DECODING", "QUEUED"}
    assert not any("no progress" in line for line in lines)
    assert while_it_ran >= 1, "a token between two chunks"


class Watch(threading.Thread):
    """Looks as an operator would, every few seconds."""

    def __init__(self, cluster):
        super().__init__(daemon=True)
        self.status, self.ready, self.took_s, self.requests = [], [], [], {}
        self._cluster, self._stopped = cluster, threading.Event()
        self.start()

    def run(self):
        while not self._stopped.wait(2.0):
            began_s = time.monotonic()
            self.ready.append(httpx.get(f"{self._cluster.url}/readyz", timeout=10).status_code)
            for item in self._cluster.requests():
                self.requests.setdefault(item.state, set()).add(item.id)
            self.took_s.append(time.monotonic() - began_s)
            self.status.append(self._cluster.flumectl("status").stdout)

    def stop(self):
        self._stopped.set()
        self.join(30)
