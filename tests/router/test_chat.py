"""Chat completions as the official client sees them."""

import pytest
from flume_protos.v1 import weight_pb2 as pb

HELLO = [{"role": "user", "content": "Hi"}]
SAID = "Hello there, wörld 🙂! The end."


async def test_a_chat_is_answered(client, weight, text_model):
    answer = await client.chat.completions.create(model="smollm2-135m", messages=HELLO)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "smollm2-135m"
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == SAID
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    [request] = weight.requests
    prompt = text_model.chat_template.render(HELLO)
    assert list(request.prompt_token_ids) == text_model.tokenizer.encode_now(prompt, add_special_tokens=False)
    assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
    said = text_model.tokenizer.encode_now(SAID, add_special_tokens=False)
    assert answer.usage.completion_tokens == len(said) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_a_stream_says_the_same(client):
    stream = await client.chat.completions.create(model="smollm2-135m", messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.role for chunk in chunks[1:]] == [None] * (len(chunks) - 1)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAID
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)


async def test_usage_comes_last_where_it_is_asked_for(client):
    stream = await client.chat.completions.create(
        model="smollm2-135m", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 5
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_max_tokens_ends_an_answer_with_length(client, weight):
    answer = await client.chat.completions.create(
        model="smollm2-135m", messages=HELLO, max_completion_tokens=2
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2
    assert weight.requests[0].sampling.max_tokens == 2


async def test_without_max_tokens_a_chat_may_fill_the_context(client, weight):
    await client.chat.completions.create(model="smollm2-135m", messages=HELLO)
    assert weight.requests[0].sampling.max_tokens == 0


async def test_sampling_fields_reach_the_weight_node(client, weight):
    await client.chat.completions.create(
        model="smollm2-135m",
        messages=HELLO,
        temperature=0.25,
        top_p=0.5,
        seed=-7,
        presence_penalty=-1,
        frequency_penalty=1.5,
        logit_bias={"17": -100, "18": 5},
        user="me",
        extra_body={
            "top_k": 5,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "ignore_eos": True,
            "min_tokens": 3,
            "stop_token_ids": [4, 5],
        },
    )
    sampling = weight.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.25, 0.5, 5, 0.125)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (
        1.5,
        -1,
        1.5,
    )
    assert (sampling.seed, sampling.ignore_eos, sampling.min_tokens) == (-7, True, 3)
    assert list(sampling.stop_token_ids) == [4, 5]
    assert dict(sampling.logit_bias) == {17: -100, 18: 5}
    assert not sampling.has_logprobs


async def test_defaults_are_openais(client, weight):
    await client.chat.completions.create(model="smollm2-135m", messages=HELLO)
    sampling = weight.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1, 1, 0)


async def test_top_p_zero_is_not_mistaken_for_unset(client, weight):
    await client.chat.completions.create(model="smollm2-135m", messages=HELLO, top_p=0)
    assert 0 < weight.requests[0].sampling.top_p < 1e-6


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(client, weight, eventually, stream):
    made = await client.chat.completions.create(
        model="smollm2-135m", messages=HELLO, stop=["zzz", "re, w"], stream=stream
    )
    if stream:
        chunks = [chunk async for chunk in made]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = made.choices[0].message.content, made.choices[0].finish_reason
    assert (text, reason) == ("Hello the", "stop")
    await eventually(lambda: weight.running == 0)


async def test_several_answers_come_side_by_side(client, weight):
    answer = await client.chat.completions.create(model="smollm2-135m", messages=HELLO, n=3, seed=2**63 - 2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {SAID}
    assert len({request.request_id for request in weight.requests}) == 3
    assert {request.sampling.seed for request in weight.requests} == {2**63 - 2, 2**63 - 1, -(2**63)}
    single = answer.usage.prompt_tokens, answer.usage.completion_tokens / 3
    assert single[0] == len(weight.requests[0].prompt_token_ids)


async def test_several_answers_stream_with_their_index(client):
    stream = await client.chat.completions.create(model="smollm2-135m", messages=HELLO, n=2, stream=True)
    texts, roles, reasons = {0: "", 1: ""}, [], []
    async for chunk in stream:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.index] * (choice.delta.role is not None)
        reasons += [choice.finish_reason] * (choice.finish_reason is not None)
    assert texts == {0: SAID, 1: SAID}
    assert sorted(roles) == [0, 1]
    assert reasons == ["stop", "stop"]


async def test_logprobs_have_openais_shape(client, weight, text_model):
    answer = await client.chat.completions.create(
        model="smollm2-135m", messages=HELLO, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    spelled = b"".join(bytes(token.bytes) for token in content)
    assert spelled.decode() == SAID
    assert [token.logprob for token in content] == [-0.5] * len(content)
    assert [len(token.top_logprobs) for token in content] == [2] * len(content)
    assert content[0].token == content[0].top_logprobs[0].token == "Hello"
    assert weight.requests[0].sampling.logprobs == 2


async def test_streamed_logprobs_leave_no_token_out_and_show_none_of_a_stop_string(client):
    stream = await client.chat.completions.create(
        model="smollm2-135m", messages=HELLO, logprobs=True, stream=True, stop="The end"
    )
    spelled = b""
    async for chunk in stream:
        logprobs = chunk.choices[0].logprobs
        spelled += b"".join(bytes(token.bytes) for token in logprobs.content) if logprobs else b""
    # " The" begins with a space that is shown, but the token would give the stop string away.
    assert spelled.decode() == "Hello there, wörld 🙂!"


async def test_content_may_come_in_text_parts(client, weight, text_model):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await client.chat.completions.create(model="smollm2-135m", messages=[{"role": "user", "content": parts}])
    prompt = text_model.chat_template.render([{"role": "user", "content": "one\ntwo"}])
    expected = text_model.tokenizer.encode_now(prompt, add_special_tokens=False)
    assert list(weight.requests[0].prompt_token_ids) == expected


async def test_a_developer_message_is_a_system_message(client, weight, text_model):
    messages = [{"role": "developer", "content": "Be brief."}, *HELLO]
    await client.chat.completions.create(model="smollm2-135m", messages=messages)
    prompt = text_model.chat_template.render([{"role": "system", "content": "Be brief."}, *HELLO])
    expected = text_model.tokenizer.encode_now(prompt, add_special_tokens=False)
    assert list(weight.requests[0].prompt_token_ids) == expected


async def test_fields_that_ask_for_nothing_are_taken(client):
    answer = await client.chat.completions.create(
        model="smollm2-135m",
        messages=HELLO,
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        store=False,
        metadata={"a": "b"},
        modalities=["text"],
        service_tier="auto",
        n=1,
        logprobs=False,
        stop=None,
    )
    assert answer.choices[0].message.content == SAID


async def test_a_token_that_is_impossible_has_openais_stand_in_for_its_logprob(client, weight):
    async def script(request, context):
        entry = pb.TokenLogprob(token_id=100, logprob=float("-inf"))
        yield pb.GenerateReply(token_ids=[100], logprobs=[pb.Logprobs(chosen=entry, top=[entry])])
        yield pb.GenerateReply(finish=pb.Finish(reason=pb.STOP, completion_tokens=1))

    weight.script = script
    answer = await client.chat.completions.create(
        model="smollm2-135m", messages=HELLO, logprobs=True, top_logprobs=1
    )
    [token] = answer.choices[0].logprobs.content
    assert (token.logprob, token.top_logprobs[0].logprob) == (-9999, -9999)
