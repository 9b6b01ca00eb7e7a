"""What clients see of a real cluster: OpenAI's own package, disconnects, wrong input, no leak."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import openai
import pytest
from flume_protos.v1 import attention_pb2, attention_pb2_grpc

pytestmark = pytest.mark.e2e

MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="module", autouse=True)
def two_nodes(cluster):
    cluster.scale(2, "--wait-drained")


@pytest.fixture(scope="module")
def client(cluster):
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)


def test_the_openai_package_gets_the_same_answer_streamed_and_whole(client):
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=40)
    pieces = list(
        client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=40, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content and text
    assert pieces[-1].usage == whole.usage
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_completions_with_a_seed_repeat_themselves_whatever_else_runs(client):
    def ask():
        return client.completions.create(
            model=MODEL, prompt="Once upon a time", max_tokens=24, temperature=0.9, seed=11, logprobs=2
        ).choices[0]

    alone = ask()
    with ThreadPoolExecutor(6) as pool:
        others = [
            pool.submit(client.completions.create, model=MODEL, prompt="x" * n, max_tokens=30)
            for n in range(1, 6)
        ]
        together = ask()
        assert all(other.result().choices[0].text is not None for other in others)
    assert together.text == alone.text
    assert together.logprobs.tokens == alone.logprobs.tokens and len(alone.logprobs.top_logprobs[0]) >= 2


def test_stop_strings_and_two_answers(client):
    answer = client.completions.create(
        model=MODEL, prompt="1, 2, 3, 4,", max_tokens=30, temperature=0, stop=["7"], n=2
    )
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    assert all("7" not in choice.text and "6" in choice.text for choice in answer.choices)


TOO_LONG = [{"role": "user", "content": "word " * 9000}]
WRONG = {
    "unknown model": ({"model": "gpt-9"}, 404, "model_not_found"),
    "prompt over the context": ({"messages": TOO_LONG}, 400, "context_length_exceeded"),
    "negative max_tokens": ({"max_tokens": -1}, 400, None),
    "unknown field": ({"frobnicate": 1}, 400, None),
    "no messages": ({"messages": []}, 400, None),
    "bad seed": ({"seed": "seven"}, 400, None),
}  # fmt: skip


@pytest.mark.parametrize("change, status, code", WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused_clearly_and_leaves_nothing_behind(cluster, change, status, code):
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 5, **change}
    answer = httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"] and error["type"]
    if code:
        assert error["code"] == code
    # What the test before this one asked for may still be on its way out.
    cluster.until(lambda: not cluster.held_blocks() and not cluster.requests(), 2, "nothing held")


def test_invalid_json_and_a_ten_megabyte_body_are_refused(cluster):
    url = f"{cluster.url}/v1/chat/completions"
    headers = {"content-type": "application/json"}
    assert httpx.post(url, content=b'{"model": ', headers=headers).status_code == 400
    big = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x" * 10_000_000}]})
    assert httpx.post(url, content=big, headers=headers).status_code == 413


def open_stream(cluster, max_tokens=2000) -> socket.socket:
    """A streaming request by hand, returned once its first token is there."""
    body = json.dumps(
        {"model": MODEL, "messages": QUESTION, "stream": True, "ignore_eos": True, "max_tokens": max_tokens}
    )
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    stream = socket.create_connection(("127.0.0.1", cluster.http_port), timeout=60)
    stream.sendall((head + body).encode())
    seen = b""
    while seen.count(b'"content":') < 3:
        seen += stream.recv(65536)
    return stream


def test_a_killed_client_frees_its_kv_on_every_node_within_a_second(cluster):
    stubs = [
        attention_pb2_grpc.AttentionStub(grpc.insecure_channel(node.address))
        for node in cluster.nodes("attention")
    ]

    def held():
        return sum(stub.Stats(attention_pb2.StatsRequest(), timeout=5).used_blocks for stub in stubs)

    streams = [open_stream(cluster) for _ in range(4)]
    assert held() > 0
    for stream in streams:
        stream.close()
    closed_s = time.monotonic()
    while held():
        assert time.monotonic() - closed_s < 1
        time.sleep(0.02)


def test_two_hundred_requests_later_no_block_is_leaked(cluster, client):
    def ask(number: int) -> int:
        if number % 4 == 0:
            stream = open_stream(cluster, max_tokens=500)
            stream.close()
            return 0
        prompt = f"Request number {number}. " * (1 + number % 7)
        answer = client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=1 + number % 9, temperature=0.5
        )
        return answer.usage.completion_tokens

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(200))) > 0
    cluster.until(lambda: cluster.held_blocks() == 0, 5, "every block free")
    cluster.until(lambda: not cluster.requests() and not cluster.routes(), 5, "no request, no route")
    for stats in cluster.stats():
        assert all((lane.sequences, lane.ranges, lane.granted_blocks) == (0, 0, 0) for lane in stats.lanes)


def test_get_shows_what_operators_look_for(cluster):
    stream = open_stream(cluster)
    try:
        nodes = cluster.get("nodes")
        assert {node["role"] for node in nodes} == {"weight", "attention", "router", "controller"}
        for node in nodes:
            assert {"id", "role", "state", "pid", "kv_capacity_tokens", "kv_used_tokens"} <= node.keys()
        (route,) = cluster.until(lambda: cluster.get("routes"), 5, "a route")
        assert {"sequence", "weight_node", "epoch", "ranges"} <= route.keys()
        assert route["ranges"][-1]["end"] is None
        (request,) = cluster.get("requests")
        assert request["id"] == route["sequence"]
    finally:
        stream.close()
