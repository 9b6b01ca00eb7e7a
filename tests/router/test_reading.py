"""Large requests are read in processes of their own: with the same outcome, and beside the streams."""

import asyncio
import itertools
import json
import os
import signal
import time
from contextlib import asynccontextmanager

import httpx
import openai
import pytest
from flume_common.model_source import resolve_model
from flume_protos.v1 import router_pb2
from flume_router.errors import BadRequest, ModelNotFound, NoWeightNode, ReaderFailed
from flume_router.http.errors import HttpError
from flume_router.http.job import Kind
from flume_router.prompts import ModelLimits, Prompts
from flume_router.reading import frames
from flume_router.reading.identity import identity
from flume_router.reading.reader import LARGE_BYTES, RequestReader
from flume_router.reading.workers import open_workers

MODEL = "smollm2-135m"
LIMITS = ModelLimits(context_tokens=8192, vocab_size=49152)
WORDS = "some words and wörds, "


class Pool:
    """Says what weight nodes would."""

    limits = known_limits = LIMITS


class NoPool:
    """As long as there are none."""

    known_limits = None

    @property
    def limits(self):
        raise NoWeightNode(MODEL)


def setup(**changes):
    source = resolve_model(MODEL)
    fields = {"path": str(source.path), "kind": source.kind, "name": source.name, "model": MODEL}
    return frames.Setup(**{**fields, "identity": identity(source), **changes})


@asynccontextmanager
async def reader_of(text_model, *, pool=None, time_limit_s=20.0, size=1, **changes):
    async with open_workers(setup(**changes), size=size, time_limit_s=time_limit_s) as workers:
        reader = RequestReader(Prompts(MODEL, text_model), workers, pool or Pool())
        reader.workers = workers
        yield reader


def body(**fields):
    return json.dumps({"model": MODEL, **fields}).encode()


def padded(data):
    """The same JSON, large."""
    return data + b" " * LARGE_BYTES


SAME = [
    (Kind.CHAT, body(messages=[{"role": "user", "content": WORDS * 9}], stop=["x", "ö"], seed=5, n=2)),
    (Kind.CHAT, body(messages=[{"role": "user", "content": "Hi"}], logit_bias={"5": 1.5}, stream=True)),
    (Kind.COMPLETION, body(prompt=["a", WORDS], echo=True, logprobs=None, max_tokens=3)),
    (Kind.COMPLETION, body(prompt=[[1, 2, 3], [49151]], echo=True)),
]
WRONG = [
    (Kind.CHAT, body(messages=[]), BadRequest),
    (Kind.CHAT, b"[]", HttpError),
    (Kind.CHAT, b"{", HttpError),
    (Kind.COMPLETION, json.dumps({"model": "other", "prompt": "x"}).encode(), ModelNotFound),
    (Kind.COMPLETION, body(prompt=[49152]), BadRequest),
    (Kind.COMPLETION, body(prompt="a b " * 9000), BadRequest),
    (Kind.COMPLETION, body(prompt="a", max_tokens=9000), BadRequest),
]


async def test_a_worker_reads_what_the_loop_would(text_model):
    async with reader_of(text_model) as reader:
        for kind, data in SAME:
            small, large = await reader.job(kind, data), await reader.job(kind, padded(data))
            assert large.common == small.common
            assert [list(ids) for ids in large.prompts] == [list(ids) for ids in small.prompts]
            assert large.echoes == small.echoes
        for kind, data, error in WRONG:
            said = []
            for one in (data, padded(data)):
                with pytest.raises(error) as caught:
                    await reader.job(kind, one)
                said.append((str(caught.value), getattr(caught.value, "param", None), caught.value.code))
            assert said[0] == said[1]
        assert reader.workers.started == 1


async def test_a_large_grpc_prompt_is_read_there_too(text_model):
    text = WORDS * (LARGE_BYTES // len(WORDS) + 1)
    async with reader_of(text_model) as reader:
        ids = await reader.grpc_prompt(router_pb2.GenerateTextRequest(prompt=text))
        assert list(ids) == text_model.tokenizer.encode_now(text, add_special_tokens=True)
        with pytest.raises(BadRequest, match="your prompt resulted in at least"):
            await reader.grpc_prompt(router_pb2.GenerateTextRequest(prompt=text * 100))
        assert reader.workers.started == 1


async def test_without_a_weight_node_nothing_large_is_read(text_model):
    async with reader_of(text_model, pool=NoPool()) as reader:
        with pytest.raises(NoWeightNode):
            await reader.job(Kind.CHAT, padded(b"{"))
        assert reader.workers.started == 0


async def test_a_worker_that_is_killed_costs_its_own_request_alone(text_model):
    async with reader_of(text_model) as reader:
        kind, data = SAME[0]
        await reader.job(kind, padded(data))
        [worker] = reader.workers._idle
        os.kill(worker._process.pid, signal.SIGSTOP)
        reading = asyncio.create_task(reader.job(kind, padded(data)))
        await asyncio.sleep(0.1)
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(ReaderFailed, match="its process ended"):
            await reading
        assert (await reader.job(kind, padded(data))).common.n == 2
        assert reader.workers.started == 2


async def test_a_worker_that_died_idle_costs_nothing(text_model):
    async with reader_of(text_model) as reader:
        kind, data = SAME[0]
        await reader.job(kind, padded(data))
        [worker] = reader.workers._idle
        os.kill(worker._process.pid, signal.SIGKILL)
        await worker._process.wait()
        assert (await reader.job(kind, padded(data))).common.n == 2


async def test_a_request_that_takes_too_long_is_ended_with_its_worker(text_model):
    async with reader_of(text_model, time_limit_s=5) as reader:
        kind, data = SAME[0]
        await reader.job(kind, padded(data))
        reader.workers._time_limit_s = 0.2
        [worker] = reader.workers._idle
        os.kill(worker._process.pid, signal.SIGSTOP)
        with pytest.raises(ReaderFailed, match=r"longer than 0\.2 s"):
            await reader.job(kind, padded(data))
        assert worker._process.returncode == -signal.SIGKILL


async def test_a_client_that_leaves_frees_the_worker(text_model):
    async with reader_of(text_model) as reader:
        kind, data = SAME[0]
        await reader.job(kind, padded(data))
        os.kill(reader.workers._idle[0]._process.pid, signal.SIGSTOP)
        reading = asyncio.create_task(reader.job(kind, padded(data)))
        await asyncio.sleep(0.1)
        reading.cancel()
        await asyncio.wait([reading])
        assert reading.cancelled()
        assert (await reader.job(kind, padded(data))).common.n == 2


async def test_other_files_than_at_the_start_are_not_used(text_model):
    async with reader_of(text_model, identity="0:0:0") as reader:
        with pytest.raises(ReaderFailed, match="changed since this router started; restart it"):
            await reader.job(Kind.CHAT, padded(b"{}"))


async def test_a_model_that_is_gone_is_named(text_model):
    async with reader_of(text_model, path="/nowhere/model.gguf") as reader:
        with pytest.raises(ReaderFailed, match=r"/nowhere/model\.gguf"):
            await reader.job(Kind.CHAT, padded(b"{}"))


async def test_a_worker_ends_with_its_router(text_model):
    async with reader_of(text_model) as reader:
        await reader.job(Kind.CHAT, padded(SAME[0][1]))
        pid = reader.workers._idle[0]._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


LARGE = {
    "messages": ("chat/completions", body(messages=[{"role": "user", "content": "a"}] * 100_000)),
    "ids": ("completions", b'{"model":"smollm2-135m","prompt":[' + b"1," * 1_900_000 + b"1]}"),
    "parts": (
        "chat/completions",
        body(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}] * 60_000}]),
    ),
    "words": ("chat/completions", body(messages=[{"role": "user", "content": "ab " * 1_300_000}])),
    "one word": ("completions", body(prompt="a" * 3_900_000)),
    "control characters": ("completions", body(prompt="\x01" * 600_000)),
    "many prompts": ("completions", body(prompt=["a b c d e " * 3000] * 127)),
}


@pytest.mark.parametrize("kind", LARGE)
async def test_a_large_body_is_refused_soon_and_streams_go_on_beside_it(
    router, weight, says, kind, text_model
):
    path, data = LARGE[kind]
    weight.script = says([100] * 400, pause_s=0.01)
    url = f"{router.http}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        stream = await client.completions.create(model=MODEL, prompt="x", stream=True, max_tokens=400)
        arrived = []

        async def follow():
            async for _ in stream:
                arrived.append(time.monotonic())

        following = asyncio.create_task(follow())
        async with httpx.AsyncClient(timeout=60) as http:
            answers = await asyncio.gather(
                *(
                    http.post(f"{url}/{path}", content=data, headers={"content-type": "application/json"})
                    for _ in range(2)
                )
            )
        await stream.close()
        following.cancel()
        await asyncio.wait([following])
    assert {answer.status_code for answer in answers} == {400}
    error = answers[0].json()["error"]
    assert error["code"] in ("context_length_exceeded", "array_above_max_length", "invalid_value")
    gaps = [after - before for before, after in itertools.pairwise(arrived)]
    # The client's own work is in these gaps too: it shares this process with the router.
    assert max(gaps) < 0.5
