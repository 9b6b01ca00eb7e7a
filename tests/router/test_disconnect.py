"""A client that goes away frees its KV at once: seen over bare sockets, as the weight node sees it."""

import asyncio
import json
import socket
import struct
import time

import pytest
from flume_protos.v1 import weight_pb2 as pb
from flume_router.weight_node import WeightNode

BODY = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hi"}]}
SOON_S = 0.5


async def send(router, body):
    reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await writer.drain()
    return reader, writer


def close_politely(writer):
    writer.close()


def close_rudely(writer):
    """With a reset, as a killed process does that had unread data."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@pytest.mark.parametrize("close", [close_politely, close_rudely])
@pytest.mark.parametrize("fields", [{"stream": True}, {}, {"stream": True, "n": 3}, {"n": 3}])
async def test_closing_the_connection_cancels_the_call(router, weight, says, eventually, close, fields):
    weight.script = says([100] * 500, pause_s=0.05)
    reader, writer = await send(router, BODY | fields)
    if fields.get("stream"):
        await reader.readuntil(b"data: ")
        await reader.readuntil(b"\n\n")
    await eventually(lambda: weight.running == fields.get("n", 1))
    closed_at = time.monotonic()
    close(writer)
    await eventually(lambda: weight.running == 0)
    assert len(weight.cancelled_at) == fields.get("n", 1)
    assert max(weight.cancelled_at.values()) - closed_at < SOON_S


@pytest.mark.parametrize("stream", [True, False])
async def test_closing_before_the_first_token_cancels_the_call(router, weight, says, eventually, stream):
    weight.script = says([100], pause_s=30)

    async def silent(request, context):
        await asyncio.sleep(30)
        yield

    weight.script = silent
    _, writer = await send(router, BODY | {"stream": stream})
    await eventually(lambda: weight.running == 1)
    closed_at = time.monotonic()
    writer.close()
    await eventually(lambda: weight.running == 0)
    assert max(weight.cancelled_at.values()) - closed_at < SOON_S


async def test_the_official_client_frees_the_kv_by_leaving_its_stream(client, weight, says, eventually):
    weight.script = says([100] * 500, pause_s=0.05)
    stream = await client.chat.completions.create(**BODY, stream=True)
    async for _ in stream:
        break
    await stream.close()
    assert await eventually(lambda: weight.running == 0) < SOON_S


async def test_a_stop_string_frees_the_kv_whoever_still_holds_the_call(
    client, weight, says, eventually, monkeypatch
):
    held, generate = [], WeightNode.generate

    def holding(self, *args, **kwargs):
        held.append(generate(self, *args, **kwargs))
        return held[-1]

    monkeypatch.setattr(WeightNode, "generate", holding)
    weight.script = says("one two " + "three " * 400, pause_s=0.05)
    answer = await client.chat.completions.create(**BODY, stop="two")
    assert answer.choices[0].message.content == "one "
    assert await eventually(lambda: weight.running == 0) < SOON_S
    assert len(held) == 1


async def test_a_client_that_does_not_read_holds_its_weight_node_back(router, weight, text_model, eventually):
    [spaces] = text_model.tokenizer.encode_now(" " * 32, add_special_tokens=False)
    sent = 0

    async def endless(request, context):
        nonlocal sent
        while True:
            yield pb.GenerateReply(token_ids=[spaces] * 1000)
            sent += 1

    weight.script = endless
    _, writer = await send(router, BODY | {"stream": True})
    before = -1
    while sent != before:  # until no more is taken
        before = sent
        await asyncio.sleep(0.3)
    assert 0 < sent < 20_000  # gRPC's windows hold some megabytes of it
    writer.close()
    assert await eventually(lambda: weight.running == 0) < SOON_S


async def test_a_hundred_clients_that_leave_leave_nothing(router, weight, says, eventually):
    weight.script = says([100] * 500, pause_s=0.02)
    writers = [(await send(router, BODY | {"stream": i % 2 == 0}))[1] for i in range(100)]
    await eventually(lambda: weight.running == 100, within_s=10)
    for writer in writers:
        writer.close()
    await eventually(lambda: weight.running == 0)
    assert len(weight.cancelled_at) == 100
