"""The bytes of HTTP: framing of events, headers, request ids, small pages."""

import asyncio
import json
import socket
import time

import httpx
import pytest
from flume_common.listening import bind
from prometheus_client.parser import text_string_to_metric_families

BODY = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hi"}]}


async def test_events_are_framed_as_the_standard_says(http):
    answer = await http.post("/v1/chat/completions", json=BODY | {"stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.text.endswith("\n\ndata: [DONE]\n\n")
    frames = answer.text.split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    chunks = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert "usage" not in chunks[0]


async def test_line_breaks_in_an_answer_stay_inside_their_event(http, weight, says):
    weight.script = says("one\n\ntwo\r\n\r\ndata: three\u2028")
    answer = await http.post("/v1/chat/completions", json=BODY | {"stream": True})
    frames = [frame for frame in answer.content.split(b"\n\n") if frame]
    chunks = [json.loads(frame.removeprefix(b"data: ")) for frame in frames[:-1]]
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert said == "one\n\ntwo\r\n\r\ndata: three\u2028"


async def test_usage_is_null_until_the_last_chunk_where_it_is_asked_for(http):
    body = BODY | {"stream": True, "stream_options": {"include_usage": True}}
    answer = await http.post("/v1/chat/completions", json=body)
    chunks = [json.loads(frame.removeprefix("data: ")) for frame in answer.text.split("\n\n")[:-2]]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []


async def test_continuous_usage_counts_in_every_chunk_what_was_generated_up_to_it(http, weight, says):
    weight.script = says([100] * 5)
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": BODY["model"], "prompt": "x", "stream": True, "max_tokens": 5, "stream_options": options}
    answer = await http.post("/v1/completions", json=body)
    chunks = [json.loads(frame.removeprefix("data: ")) for frame in answer.text.split("\n\n")[:-2]]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    whole = await http.post("/v1/completions", json={"model": BODY["model"], "prompt": "x", "max_tokens": 5})
    assert counts[-1] == whole.json()["usage"]["completion_tokens"]
    assert all(
        chunk["usage"]["total_tokens"] == 1 + count for chunk, count in zip(chunks, counts, strict=True)
    )


async def test_continuous_usage_alone_asks_for_none(http):
    body = BODY | {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    answer = await http.post("/v1/chat/completions", json=body)
    assert "usage" not in answer.text


async def test_usage_says_how_much_of_a_prompt_was_reused(http):
    usage = (await http.post("/v1/chat/completions", json=BODY)).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


async def test_tokens_are_sent_as_they_come(router, weight, says):
    weight.script = says([100] * 5, pause_s=0.1)
    arrived = []
    body = {"model": BODY["model"], "prompt": "x", "stream": True}
    async with (
        httpx.AsyncClient() as client,
        client.stream("POST", f"{router.http}/v1/completions", json=body) as answer,
    ):
        async for line in answer.aiter_lines():
            if line:
                arrived.append(time.monotonic())
    assert arrived[-1] - arrived[0] > 0.3
    assert arrived[1] - arrived[0] > 0.05


async def test_small_writes_do_not_wait_for_acknowledgements():
    """With Nagle's algorithm on, every token after the first would come 40 ms late."""
    accepted = asyncio.get_running_loop().create_future()
    bound = bind("127.0.0.1:0")
    server = await asyncio.start_server(lambda _, writer: accepted.set_result(writer), sock=bound)
    async with server:
        _, client = await asyncio.open_connection(*bound.getsockname())
        writer = await accepted
        assert writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        client.close()
        writer.close()


@pytest.mark.parametrize("given", ["abc-123", "x" * 128])
async def test_a_request_id_is_taken_returned_and_passed_on(http, weight, given):
    answer = await http.post("/v1/chat/completions", json=BODY, headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == given
    assert weight.metadata[0]["x-request-id"] == given
    assert weight.requests[0].request_id == answer.json()["id"]


@pytest.mark.parametrize("given", ["x" * 129, "a b", "é".encode("latin-1"), ""])
async def test_a_request_id_that_could_do_harm_is_replaced(http, given):
    answer = await http.get("/v1/models", headers={"x-request-id": given})
    assert answer.headers["x-request-id"].startswith("req_")


async def test_every_log_line_of_a_request_carries_its_id(http, capsys):
    await http.post("/v1/chat/completions", json=BODY, headers={"x-request-id": "find-me"})
    await http.post("/v1/chat/completions", json=BODY | {"n": 0}, headers={"x-request-id": "find-me"})
    lines = capsys.readouterr().out.splitlines()
    about = [line for line in lines if "request_" in line.split("]")[1] or "http_request" in line]
    about = [line for line in about if "/readyz" not in line]
    assert len(about) == 4
    assert all("find-me" in line for line in about)


async def test_models_are_listed(http, client):
    [model] = [model async for model in client.models.list()]
    assert (model.id, model.object, model.owned_by) == ("smollm2-135m", "model", "kernelflume")
    assert (await client.models.retrieve("smollm2-135m")).id == "smollm2-135m"
    for path in ("/v1/models", "/v1/models/"):
        assert (await http.get(path)).json()["data"][0]["max_model_len"] == 512


@pytest.mark.parametrize("path", ["/health", "/healthz", "/livez", "/readyz", "/version"])
async def test_small_pages_answer(http, path):
    assert (await http.get(path)).status_code == 200


async def test_metrics_are_what_prometheus_reads_and_as_things_are(http, router):
    answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    (build,) = families.pop("flume_build_info").samples
    assert build.labels == {"version": (await http.get("/version")).json()["version"]}
    refused = {sample.labels["reason"]: sample.value for sample in families.pop("flume_http_refused").samples}
    assert {"queue", "connections", "header_timeout", "too_large"} <= set(refused)
    assert set(refused.values()) == {0}
    connections = families.pop("flume_http_connections").samples
    assert sum(sample.value for sample in connections) >= 1
    values = {
        name: family.samples[0].value
        for name, family in families.items()
        if name[:6] == "flume_" and family.samples
    }
    assert (
        values.items()
        >= {
            "flume_store_connected": 1,
            "flume_router_ready": 1,
            "flume_requests_running": 0,
            "flume_requests_waiting": 0,
            "flume_http_body_bytes": 0,
        }.items()
    )
    assert all(family.documentation for family in families.values())


async def test_connections_are_kept(router):
    reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
    for _ in range(2):
        writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 2)
        assert head.startswith(b"HTTP/1.1 200")
        assert await reader.readexactly(2) == b"ok"
    writer.close()
