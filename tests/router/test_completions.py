"""Plain completions as the official client sees them."""

import pytest

SAID = "Hello there, wörld 🙂! The end."


async def test_a_prompt_is_completed_with_at_most_16_tokens(client, weight, text_model, says):
    weight.script = says(list(range(100, 140)))
    answer = await client.completions.create(model="smollm2-135m", prompt="Once upon")
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].text == text_model.tokenizer.decode(range(100, 116))
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16
    [request] = weight.requests
    assert list(request.prompt_token_ids) == text_model.tokenizer.encode_now(
        "Once upon", add_special_tokens=True
    )
    assert answer.usage.prompt_tokens == len(request.prompt_token_ids)


async def test_a_stream_says_the_same(client):
    stream = await client.completions.create(
        model="smollm2-135m", prompt="x", max_tokens=99, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == SAID
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == 1


@pytest.mark.parametrize(
    "prompt, texts",
    [
        ("ab c", ["ab c"]),
        (["ab c", "d"], ["ab c", "d"]),
    ],
)
async def test_text_prompts_are_tokenised(client, weight, text_model, prompt, texts):
    answer = await client.completions.create(model="smollm2-135m", prompt=prompt)
    assert [choice.index for choice in answer.choices] == list(range(len(texts)))
    expected = [text_model.tokenizer.encode_now(text, add_special_tokens=True) for text in texts]
    assert sorted(list(request.prompt_token_ids) for request in weight.requests) == sorted(expected)
    assert answer.usage.prompt_tokens == sum(map(len, expected))


@pytest.mark.parametrize("prompt, ids", [([5, 6], [[5, 6]]), ([[5, 6], [7]], [[5, 6], [7]])])
async def test_token_prompts_are_taken_as_they_are(client, weight, prompt, ids):
    await client.completions.create(model="smollm2-135m", prompt=prompt)
    assert sorted(list(request.prompt_token_ids) for request in weight.requests) == sorted(ids)


async def test_choices_go_prompt_by_prompt(client, weight, text_model):
    async def echo(request, context):
        from flume_protos.v1 import weight_pb2 as pb

        yield pb.GenerateReply(token_ids=request.prompt_token_ids)
        yield pb.GenerateReply(finish=pb.Finish(reason=pb.STOP, completion_tokens=2))

    weight.script = echo
    answer = await client.completions.create(model="smollm2-135m", prompt=["one", "two"], n=2, best_of=2)
    assert [choice.text for choice in answer.choices] == ["one", "one", "two", "two"]
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.completion_tokens == 8


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_first(client, stream):
    made = await client.completions.create(
        model="smollm2-135m", prompt="Say: ", max_tokens=99, echo=True, stream=stream
    )
    chunks = [chunk async for chunk in made] if stream else [made]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Say: " + SAID


async def test_logprobs_have_openais_shape(client):
    answer = await client.completions.create(model="smollm2-135m", prompt="x", max_tokens=99, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs == [-0.5] * len(logprobs.tokens)
    assert [len(top) for top in logprobs.top_logprobs] == [2] * len(logprobs.tokens)
    text = answer.choices[0].text
    whole = [(t, o) for t, o in zip(logprobs.tokens, logprobs.text_offset, strict=True) if "bytes:" not in t]
    assert len(whole) > 5
    assert all(text[offset:].startswith(token) for token, offset in whole)


async def test_a_part_of_a_character_is_shown_as_bytes_in_logprobs(client, weight, text_model, says):
    ids = text_model.tokenizer.encode_now("𓀀", add_special_tokens=False)
    weight.script = says(ids)
    answer = await client.completions.create(model="smollm2-135m", prompt="x", max_tokens=99, logprobs=0)
    assert answer.choices[0].text == "𓀀"
    assert "".join(answer.choices[0].logprobs.tokens) == "bytes:\\xf0bytes:\\x93bytes:\\x80bytes:\\x80"
    assert len(ids) == 4


async def test_an_empty_prompt_begins_a_document(http, weight):
    answer = await http.post("/v1/completions", json={"model": "smollm2-135m", "prompt": ""})
    assert answer.status_code == 200
    assert list(weight.requests[0].prompt_token_ids) == [1]


async def test_an_echo_may_be_all_that_is_wanted(http, weight):
    body = {"model": "smollm2-135m", "prompt": "hi", "max_tokens": 0, "echo": True}
    answer = (await http.post("/v1/completions", json=body)).json()
    assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == ("hi", 0)
    assert not weight.requests
    assert (await http.post("/v1/completions", json={**body, "echo": False})).status_code == 400
