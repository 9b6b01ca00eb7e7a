"""Weight nodes die while they answer; clients read on, through every front door."""

import asyncio
import json
import math
import re
from contextlib import asynccontextmanager

import grpc
import httpx
import pytest
from flume_protos.v1 import router_pb2, weight_pb2
from flume_protos.v1 import router_pb2_grpc as router_rpc
from flume_protos.v1 import weight_pb2 as pb
from structlog.testing import capture_logs

MODEL = "smollm2-135m"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}]}
SAID = "Hello there, wörld 🙂! One two three four."
BODY = {CHAT: {"model": MODEL, **MESSAGES}, TEXT: {"model": MODEL, "prompt": "Hi"}}


@asynccontextmanager
async def two(start_weight, start_router, script, *flags):
    """A router before two weight nodes with the same script."""
    async with (
        start_weight("a", script) as a,
        start_weight("b", script) as b,
        start_router(*flags) as router,
    ):
        async with asyncio.timeout(5):
            while not (a.num_described and b.num_described):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        yield router, a, b


async def post(router, path=CHAT, **changes):
    async with httpx.AsyncClient(timeout=20) as client:
        return await client.post(router.http + path, json=BODY[path] | changes)


def events(answer):
    data = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    return [json.loads(line) for line in data if line != "[DONE]"]


def said(path, answer, stream, index=0):
    if not stream:
        choice = answer.json()["choices"][index]
        return choice["message"]["content"] if path == CHAT else choice["text"]
    choices = [c for event in events(answer) for c in event["choices"] if c["index"] == index]
    return "".join(c["delta"].get("content", "") if path == CHAT else c["text"] for c in choices)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_goes_on_where_its_node_died(start_weight, start_router, dies, path, stream):
    async with two(start_weight, start_router, dies(SAID, 3, 0, 6)) as (router, a, b):
        options = {"stream_options": {"include_usage": True}} if stream else {}
        answer = await post(router, path, stream=stream, logprobs=True if path == CHAT else 0, **options)
        assert said(path, answer, stream) == SAID
        attempts = sorted((*a.requests, *b.requests), key=lambda r: len(r.output_token_ids))
        assert [len(r.output_token_ids) for r in attempts] == [0, 3, 3, 9]
        assert len({r.request_id for r in attempts}) == 1
        assert attempts[0].adopt_from == ""
        assert {r.adopt_from for r in attempts[1:]} <= {"a", "b"}
        whole = events(answer)[-1] if stream else answer.json()
        count = len(a.script.ids)
        assert whole["usage"]["completion_tokens"] == count + 1  # with the closing stop token
        assert whole["usage"]["prompt_tokens"] == len(attempts[0].prompt_token_ids)
        assert answer.text.count('"finish_reason":"stop"') == 1
        if stream:
            assert answer.text.endswith("data: [DONE]\n\n")
        assert num_logprobs(path, answer, stream) == count


def num_logprobs(path, answer, stream):
    choices = [c for event in (events(answer) if stream else [answer.json()]) for c in event["choices"]]
    field = "content" if path == CHAT else "token_logprobs"
    return sum(len(c["logprobs"][field]) for c in choices if c.get("logprobs"))


async def test_grpc_answers_go_on_too(start_weight, start_router, dies):
    async with two(start_weight, start_router, dies(SAID, 4, 4)) as (router, a, _):
        async with grpc.aio.insecure_channel(router.grpc_address) as channel:
            call = router_rpc.RouterStub(channel).Generate(router_pb2.GenerateTextRequest(prompt="Hi"))
            replies = [reply async for reply in call]
        assert "".join(reply.text for reply in replies) == SAID
        assert [i for reply in replies for i in reply.token_ids] == a.script.ids
        assert replies[-1].finish.reason == weight_pb2.STOP
        assert replies[-1].finish.completion_tokens == len(a.script.ids) + 1


@pytest.mark.parametrize("stream", [True, False])
async def test_each_of_several_answers_goes_on_by_itself(start_weight, start_router, dies, stream):
    async with two(start_weight, start_router, dies(SAID, 2, 7, 5, 1)) as (router, a, b):
        answer = await post(router, stream=stream, n=3, temperature=1)
        assert [said(CHAT, answer, stream, index) for index in range(3)] == [SAID] * 3
        attempts = (*a.requests, *b.requests)
        assert len(attempts) == 3 + 4
        seeds = {(r.request_id, r.sampling.seed) for r in attempts}
        assert len(seeds) == len({seed for _, seed in seeds}) == 3  # one for each answer, kept


async def test_a_stop_string_is_found_across_the_cut(start_weight, start_router, dies):
    async with two(start_weight, start_router, dies("one two three four", 2)) as (router, _, _):
        answer = await post(router, stop="two three")
        assert said(CHAT, answer, False) == "one "
        assert answer.json()["choices"][0]["finish_reason"] == "stop"


async def test_an_answer_that_only_lacked_its_end_gets_it(start_weight, start_router, dies):
    async with two(start_weight, start_router, dies(SAID, 4)) as (router, a, b):
        answer = (await post(router, max_tokens=4)).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 4
        assert {r.sampling.max_tokens for r in (*a.requests, *b.requests)} == {4}


async def test_a_silent_node_is_left(start_weight, start_router, dies, asks_often):
    async def hang(request, context):
        await asyncio.sleep(3600)
        yield

    async with two(start_weight, start_router, dies(SAID, 3, end=hang), "--silence-s", "0.6") as (
        router,
        a,
        b,
    ):
        a.silent.set()
        b.silent.set()
        asking = asyncio.create_task(post(router))
        while not a.running + b.running:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        healthy, other = (b, a) if a.running else (a, b)
        healthy.silent.clear()
        assert said(CHAT, await asking, False) == SAID
        assert [len(r.output_token_ids) for r in healthy.requests] == [3]
        assert healthy.requests[0].adopt_from == other.node
        assert other.running == 0  # the call there is not left open


async def test_a_node_that_takes_its_time_but_answers_is_not_left(
    start_weight, start_router, says, asks_often
):
    slow = says([100], pause_s=1.5)
    async with two(start_weight, start_router, slow, "--silence-s", "0.5") as (router, a, b):
        assert (await post(router)).status_code == 200
        assert len(a.requests) + len(b.requests) == 1


async def test_a_node_that_comes_back_continues_its_own_answers(start_weight, start_router, dies, eventually):
    script = dies(SAID, 3)
    async with start_router(wait_ready=False) as router:
        async with start_weight("a", script) as a:
            await eventually(lambda: a.num_described)
            asking = asyncio.create_task(stream_lines(router))
            await eventually(lambda: not script.lives)
            await a.server.grpc.stop(0)
        await asyncio.sleep(0.3)
        assert not asking.done()
        async with start_weight("a", script) as again:
            lines = await asking
            assert [len(r.output_token_ids) for r in again.requests] == [3]
            assert again.requests[0].adopt_from == "a"
    assert "".join(re.findall(r'"content":"([^"]*)"', "".join(lines))) == SAID


async def stream_lines(router, **changes):
    async with (
        httpx.AsyncClient(timeout=20) as client,
        client.stream("POST", router.http + CHAT, json=BODY[CHAT] | {"stream": True} | changes) as answer,
    ):
        return [line async for line in answer.aiter_lines()]


async def test_when_no_node_comes_back_the_stream_ends_with_an_error(start_weight, start_router, dies):
    script = dies(SAID, 3)
    async with start_weight("a", script) as a, start_router("--resume-s", "0.5") as router:

        async def gone(request, context):
            a.silent.set()
            await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
            yield

        script.end = gone
        async with httpx.AsyncClient(timeout=20) as client:
            url, headers = router.http + CHAT, {"x-request-id": "mine"}
            answer = await client.post(url, json=BODY[CHAT] | {"stream": True}, headers=headers)
        error = events(answer)[-1]["error"]
        assert (error["code"], error["request_id"]) == ("service_unavailable", "mine")
        assert "could go on after 3 tokens: weight node a went away: killed" in error["message"]
        assert "[DONE]" not in answer.text
        async with grpc.aio.insecure_channel(router.grpc_address) as channel:
            call = router_rpc.RouterStub(channel).Generate(router_pb2.GenerateTextRequest(prompt="Hi"))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            trailers = dict(caught.value.trailing_metadata())
            assert trailers["x-request-id"].startswith("gen-")


async def test_an_attempt_that_is_not_cleared_away_yet_is_waited_for(start_weight, start_router, dies):
    script, refusals = dies(SAID, 3), [1, 2, 3]

    async def exists(request, context):
        if request.output_token_ids and refusals:
            refusals.pop()
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "a sequence of this name is live")
        async for reply in script(request, context):
            yield reply

    async with start_weight("a", exists) as a, start_router() as router:
        assert said(CHAT, await post(router), False) == SAID
        assert len(a.requests) == 5


async def test_a_client_that_leaves_while_nobody_serves_it_is_forgotten(
    start_weight, start_router, dies, eventually, asks_often
):
    script = dies(SAID, 3)
    async with start_weight("a", script) as a, start_router() as router:
        async with httpx.AsyncClient() as client:

            async def gone(request, context):
                a.silent.set()
                await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
                yield

            script.end = gone
            asking = asyncio.create_task(client.post(router.http + CHAT, json=BODY[CHAT]))
            await eventually(a.silent.is_set)
            asking.cancel()
        a.silent.clear()
        assert (await post(router)).status_code == 200
        assert len({r.request_id for r in a.requests}) == len(a.requests) == 2


async def test_resumes_are_told_in_the_log(start_weight, start_router, dies):
    with capture_logs() as logs:
        async with two(start_weight, start_router, dies(SAID, 3)) as (router, _, _):
            await post(router)
    [told] = [entry for entry in logs if entry["event"] == "sequence_resumed"]
    assert {told["from"], told["to"]} == {"a", "b"}
    assert (told["tokens_so_far"], told["resumed_total"]) == (3, 1)
    assert told["request"].startswith("chatcmpl-")
    assert 0 < told["elapsed_ms"] < 5000
    [interrupted] = [entry for entry in logs if entry["event"] == "sequence_interrupted"]
    assert (interrupted["reason"], interrupted["weight_node"]) == ("lost", told["from"])


async def test_greedy_answers_get_no_seed_and_own_seeds_stay(start_weight, start_router, dies):
    async with start_weight("a", dies(SAID)) as a, start_router() as router:
        await post(router, temperature=0)
        await post(router, temperature=1, seed=5)
        await post(router, temperature=1)
        assert not a.requests[0].sampling.HasField("seed")
        assert a.requests[1].sampling.seed == 5
        assert a.requests[2].sampling.HasField("seed")
        assert math.isclose(a.requests[2].sampling.temperature, 1)


async def test_a_refusal_is_final(start_weight, start_router):
    async def refuse(request, context):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "temperature is 9")
        yield pb.GenerateReply()

    async with two(start_weight, start_router, refuse) as (router, a, b):
        assert (await post(router)).status_code == 400
        assert len(a.requests) + len(b.requests) == 1
