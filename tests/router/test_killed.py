"""Weight nodes as processes: killed, and stopped, in the middle of an answer."""

import asyncio
import contextlib
import json
import signal
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from flume_common.membership import Member, Role, State, register
from structlog.testing import capture_logs

SAID = "It was a bright cold day in April, and the clocks were striking thirteen. " * 3
BODY = {
    "model": "smollm2-135m",
    "messages": [{"role": "user", "content": "Hi"}],
    "stream": True,
    "stream_options": {"include_usage": True},
}


@pytest.fixture
def start_process(store, keys, text_model):
    """A weight node's process, listed in etcd whatever becomes of it."""
    ids = text_model.tokenizer.encode_now(SAID, add_special_tokens=False)

    @asynccontextmanager
    async def start(node):
        script = Path(__file__).with_name("weight_process.py")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(script), "127.0.0.1:0", *map(str, ids)), stdout=asyncio.subprocess.PIPE
        )
        member = Member(
            id=node,
            role=Role.WEIGHT,
            state=State.READY,
            address=(await process.stdout.readline()).decode().strip(),
            host="here",
            pid=process.pid,
            version="0",
            protocol_version=1,
            started_at_s=time.time(),
            model="smollm2-135m",
            context_tokens=512,
        )
        try:
            async with register(store, keys, member, ttl_s=5.0):
                yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    return start


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
async def test_no_token_is_lost_or_told_twice(start_process, start_router, text_model, asks_often, fate):
    async with (
        start_process("a") as a,
        start_router("--silence-s", "1") as router,
        httpx.AsyncClient(timeout=20) as client,
    ):
        streams = [asyncio.create_task(read(client, router)) for _ in range(4)]
        await asyncio.sleep(0.8)  # some tokens
        async with start_process("b"):
            a.send_signal(fate)
            with capture_logs() as logs:
                answers = await asyncio.gather(*streams)
    count = len(text_model.tokenizer.encode_now(SAID, add_special_tokens=False))
    assert answers == [(SAID, "stop", count)] * 4
    resumed = [entry for entry in logs if entry["event"] == "sequence_resumed"]
    assert [(entry["from"], entry["to"]) for entry in resumed] == [("a", "b")] * 4
    assert all(0 < entry["tokens_so_far"] < count for entry in resumed)


async def read(client, router):
    """Text, finish reason and completion tokens of a stream."""
    answer = await client.post(f"{router.http}/v1/chat/completions", json=BODY)
    *lines, done = [line for line in answer.text.split("\n\n") if line]
    assert done == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    choices = [choice for event in events for choice in event["choices"]]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    return text, choices[-1]["finish_reason"], events[-1]["usage"]["completion_tokens"]


async def test_a_node_that_was_only_stopped_goes_on_by_itself(start_process, start_router, asks_often):
    """The only one there is: nobody else could take over."""
    async with (
        start_process("a") as a,
        start_router("--silence-s", "0.5") as router,
        httpx.AsyncClient(timeout=20) as client,
    ):
        streams = [asyncio.create_task(read(client, router)) for _ in range(2)]
        await asyncio.sleep(0.8)
        a.send_signal(signal.SIGSTOP)
        await asyncio.sleep(1.5)
        a.send_signal(signal.SIGCONT)
        assert [text for text, _, _ in await asyncio.gather(*streams)] == [SAID] * 2
