"""Processes die under a stream; the stream does not notice. `tests/soak` does this many times over."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import oracle
from streams import Stream

pytestmark = pytest.mark.e2e
TOKENS = 120


@pytest.fixture(scope="module")
def undisturbed(cluster):
    cluster.scale(2, "--wait-drained")
    return Stream(cluster, oracle.PLAIN["500 tokens"], TOKENS).result()


@pytest.mark.parametrize("role", ["attention", "weight", "controller"])
def test_a_stream_goes_on_with_the_same_tokens_when_a_process_is_killed(cluster, undisturbed, role):
    stream = Stream(cluster, oracle.PLAIN["500 tokens"], TOKENS)
    stream.wait_for(30)
    os.kill(cluster.pid_in_use(role), signal.SIGKILL)
    assert stream.result() == undisturbed
    cluster.until(lambda: cluster.held_blocks() == 0, 15, "every block free")
    cluster.until(cluster.settled, 60, "as many nodes as desired")
