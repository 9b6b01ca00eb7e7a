"""Nodes die or leave under a stream, which does not notice. `tests/soak` does this many times over."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from flume_controller.cluster_files import ClusterFiles

sys.path.insert(0, str(Path(__file__).parent))
import oracle
from clusters import Cluster
from streams import RetryingStream, Stream

pytestmark = pytest.mark.e2e
PROMPT = oracle.PLAIN["500 tokens"]
TOKENS = 90


def streamed(cluster: Cluster) -> Stream:
    return Stream(cluster.router(), PROMPT, TOKENS)


@pytest.fixture(scope="module")
def undisturbed(cluster):
    cluster.scale(2, "--wait-drained")
    return streamed(cluster).result()


def nothing_is_left(cluster: Cluster) -> None:
    cluster.until(lambda: cluster.held_blocks() == 0, 15, "every block free")
    cluster.until(lambda: not cluster.routes(), 15, "no route left")
    cluster.until(cluster.settled, 60, "as many nodes as desired")


@pytest.mark.parametrize("role", ["attention", "weight", "controller"])
def test_a_stream_goes_on_with_the_same_tokens_when_a_process_is_killed(cluster, undisturbed, role):
    stream = streamed(cluster)
    stream.wait_for(30)
    os.kill(cluster.in_use(role)[0].pid, signal.SIGKILL)
    assert stream.result() == undisturbed
    nothing_is_left(cluster)


def test_a_stream_does_not_notice_that_another_up_takes_its_cluster_over(cluster, undisturbed):
    files = ClusterFiles(cluster.data_dir, "default")
    before = {record.id: record.pid for record in files.leftovers()}
    stream = streamed(cluster)
    stream.wait_for(20)
    os.kill(files.read().supervisor.pid, signal.SIGKILL)
    stream.wait_for(30)
    cluster.up()
    assert stream.is_alive(), "it was taken over under the stream"
    assert stream.result() == undisturbed
    assert {record.id: record.pid for record in files.leftovers()} == before
    nothing_is_left(cluster)


def test_a_stream_goes_on_with_the_same_tokens_when_its_node_is_drained(cluster, undisturbed):
    stream = streamed(cluster)
    stream.wait_for(30)
    node = cluster.in_use("attention")[0].id
    cluster.flumectl("drain", node, "--timeout", "0")
    assert stream.result() == undisturbed
    cluster.until(lambda: node not in {n.id for n in cluster.nodes()}, 15, f"{node} is gone")
    nothing_is_left(cluster)


def test_a_client_that_asks_again_gets_the_same_answer_when_the_router_is_killed(cluster):
    def ask() -> RetryingStream:
        return RetryingStream(cluster.url, "smollm2-135m", oracle.PLAIN["a question"], 40)

    answer = "".join(ask().result())
    stream = ask()
    stream.wait_for(5)
    os.kill(cluster.nodes("router")[0].pid, signal.SIGKILL)
    assert "".join(stream.result()) == answer and answer
    assert stream.attempts > 1
    nothing_is_left(cluster)
