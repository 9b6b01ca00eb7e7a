"""Every process of a real cluster, as Prometheus finds and reads it."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import oracle
from metrics_lint import problems, values
from streams import Stream

pytestmark = pytest.mark.e2e


def ask(node, path):
    return httpx.get(f"http://{node['metrics_address']}{path}", timeout=5)


def pages(cluster):
    """Values by role; of one node each."""
    found = {}
    for node in cluster.get("nodes"):
        text = ask(node, "/metrics").text
        assert problems(text) == [], node["id"]
        found[node["role"]] = values(text)
    return found


def test_every_process_says_how_it_is_while_a_stream_runs_and_after(cluster):
    cluster.scale(1, "--wait-drained")
    nodes = cluster.get("nodes")
    assert {node["role"] for node in nodes} == {"controller", "router", "weight", "attention"}
    for node in nodes:
        assert ask(node, "/livez").text == ask(node, "/readyz").text == "ok", node["id"]
    stream = Stream(cluster.router(), oracle.PLAIN["500 tokens"], 60)
    stream.wait_for(20)
    during = pages(cluster)
    stream.result()
    cluster.until(lambda: not cluster.routes(), 15, "no route left")
    after = pages(cluster)
    for name, running, idle in (
        ("router", "flume_requests_running", 0),
        ("weight", "flume_requests_running", 0),
        ("attention", "flume_sequences_held", 0),
    ):
        assert (during[name][running], after[name][running]) == (1, idle), name
    assert during["attention"]["flume_kv_used_tokens"] > 500 > after["attention"]["flume_kv_used_tokens"]
    assert during["attention"]["flume_kv_cache_usage_ratio"] > 0
    assert during["weight"]["flume_lanes"] == during["attention"]["flume_lanes"] == 1
    assert {page["flume_store_connected"] for page in during.values()} == {1}
    assert during["controller"]['flume_attention_replicas{state="ready"}'] == 1
    assert during["controller"]['leader_election_master_status{name="controller"}'] == 1


def test_the_address_is_shown_to_people(cluster):
    (router,) = (node for node in cluster.get("nodes") if node["role"] == "router")
    assert router["metrics_address"] in cluster.flumectl("get", "nodes", "-o", "wide").stdout
    assert (
        f"http://{router['metrics_address']}/metrics"
        in cluster.flumectl("describe", "node", "router-1").stdout
    )
