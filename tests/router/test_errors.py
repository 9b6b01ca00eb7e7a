"""Every way to be wrong over HTTP: status, type, param and code as OpenAI's, and nothing left behind."""

import json
import typing

import grpc
import httpx
import openai
import pytest
from flume_protos.v1 import weight_pb2 as pb

HI = [{"role": "user", "content": "Hi"}]
CHAT = {"model": "smollm2-135m", "messages": HI}
TEXT = {"model": "smollm2-135m", "prompt": "Hi"}
INT64 = 2**63


def chat(**changes):
    return "/v1/chat/completions", CHAT | changes


def text(**changes):
    return "/v1/completions", TEXT | changes


def messages(*listed):
    return chat(messages=list(listed))


def without(request, name):
    path, body = request
    return path, {key: value for key, value in body.items() if key != name}


WRONG = [
    # request, status, param, code
    (chat(model="gpt-5"), 404, "model", "model_not_found"),
    (text(model="gpt-5"), 404, "model", "model_not_found"),
    (chat(model=7), 400, "model", "invalid_type"),
    (without(chat(), "model"), 400, "model", "missing_required_parameter"),
    (without(chat(), "messages"), 400, "messages", "missing_required_parameter"),
    (without(text(), "prompt"), 400, "prompt", "missing_required_parameter"),
    (chat(messages=[]), 400, "messages", "empty_array"),
    (chat(messages="Hi"), 400, "messages", "invalid_type"),
    (chat(messages=None), 400, "messages", "invalid_type"),
    (messages("Hi"), 400, "messages[0]", "invalid_type"),
    (messages({"content": "Hi"}), 400, "messages[0].role", "missing_required_parameter"),
    (messages({"role": "wizard", "content": "Hi"}), 400, "messages[0].role", "invalid_value"),
    (messages({"role": "function", "content": "Hi"}), 400, "messages[0].role", "unsupported_value"),
    (messages({"role": ["user"], "content": "Hi"}), 400, "messages[0].role", "invalid_type"),
    (messages({"role": "user"}), 400, "messages[0].content", "invalid_type"),
    (messages({"role": "user", "content": 5}), 400, "messages[0].content", "invalid_type"),
    (messages({"role": "user", "content": []}), 400, "messages[0].content", "empty_array"),
    (
        messages({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
        400,
        "messages[0].content[0].type",
        "unsupported_value",
    ),
    (
        messages({"role": "user", "content": [{"type": "text"}]}),
        400,
        "messages[0].content[0].text",
        "invalid_type",
    ),
    (
        messages({"role": "user", "content": "x", "mood": "good"}),
        400,
        "messages[0].mood",
        "unknown_parameter",
    ),
    (
        messages({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}),
        400,
        "messages[0].tool_calls[0].function",
        "invalid_type",
    ),
    (chat(max_tokens=-1), 400, "max_tokens", "integer_below_min_value"),
    (chat(max_tokens=0), 400, "max_tokens", "integer_below_min_value"),
    (chat(max_completion_tokens=-1), 400, "max_completion_tokens", "integer_below_min_value"),
    (text(max_tokens=-1), 400, "max_tokens", "integer_below_min_value"),
    (chat(max_tokens=1.5), 400, "max_tokens", "invalid_type"),
    (chat(max_tokens=True), 400, "max_tokens", "invalid_type"),
    (chat(max_tokens=5, max_completion_tokens=6), 400, "max_tokens", "invalid_parameter_combination"),
    (chat(seed="seven"), 400, "seed", "invalid_type"),
    (chat(seed=1.5), 400, "seed", "invalid_type"),
    (chat(seed=INT64), 400, "seed", "integer_above_max_value"),
    (chat(seed=-INT64 - 1), 400, "seed", "integer_below_min_value"),
    (chat(seed=10**400), 400, "seed", "integer_above_max_value"),
    (text(seed=INT64), 400, "seed", "integer_above_max_value"),
    (chat(temperature=2.1), 400, "temperature", "decimal_above_max_value"),
    (chat(temperature=-0.1), 400, "temperature", "decimal_below_min_value"),
    (chat(temperature="hot"), 400, "temperature", "invalid_type"),
    (chat(top_p=1.1), 400, "top_p", "decimal_above_max_value"),
    (chat(presence_penalty=-3), 400, "presence_penalty", "decimal_below_min_value"),
    (chat(frequency_penalty=3), 400, "frequency_penalty", "decimal_above_max_value"),
    (chat(repetition_penalty=0), 400, "repetition_penalty", "invalid_value"),
    (chat(top_k=-2), 400, "top_k", "integer_below_min_value"),
    (chat(min_p=2), 400, "min_p", "decimal_above_max_value"),
    (chat(min_tokens=9, max_tokens=8), 400, "min_tokens", "invalid_parameter_combination"),
    (chat(n=0), 400, "n", "integer_below_min_value"),
    (chat(n=129), 400, "n", "integer_above_max_value"),
    (text(prompt=["a"] * 65, n=2), 400, "n", "invalid_parameter_combination"),
    (text(best_of=2), 400, "best_of", "invalid_parameter_combination"),
    (text(echo=True, logprobs=1), 400, "echo", "invalid_parameter_combination"),
    (text(suffix="end"), 400, "suffix", "unsupported_parameter"),
    (text(logprobs=6), 400, "logprobs", "integer_above_max_value"),
    (text(logprobs=True), 400, "logprobs", "invalid_type"),
    (chat(logprobs=3), 400, "logprobs", "invalid_type"),
    (chat(top_logprobs=3), 400, "top_logprobs", "invalid_parameter_combination"),
    (chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "integer_above_max_value"),
    (chat(stop=["a"] * 65), 400, "stop", "array_above_max_length"),
    (chat(stop=""), 400, "stop", "invalid_value"),
    (chat(stop=["a", 5]), 400, "stop[1]", "invalid_type"),
    (chat(logit_bias={"5": 101}), 400, "logit_bias.5", "decimal_above_max_value"),
    (chat(logit_bias={"five": 1}), 400, "logit_bias", "invalid_value"),
    (chat(logit_bias={"49152": 1}), 400, "logit_bias", "invalid_value"),
    (chat(logit_bias=[1]), 400, "logit_bias", "invalid_type"),
    (chat(stop_token_ids=[49152]), 400, "stop_token_ids", "invalid_value"),
    (chat(stop_token_ids=[-1]), 400, "stop_token_ids[0]", "integer_below_min_value"),
    (chat(stream="yes"), 400, "stream", "invalid_type"),
    (chat(stream_options={"include_usage": True}), 400, "stream_options", "invalid_parameter_combination"),
    (chat(stream=True, stream_options={"often": True}), 400, "stream_options.often", "unknown_parameter"),
    (chat(user=5), 400, "user", "invalid_type"),
    (chat(foo=1), 400, "foo", "unknown_parameter"),
    (text(foo=1), 400, "foo", "unknown_parameter"),
    (text(messages=HI), 400, "messages", "unknown_parameter"),
    (chat(prompt="Hi"), 400, "prompt", "unknown_parameter"),
    (chat(tools=[{"type": "function"}]), 400, "tools", "unsupported_parameter"),
    (chat(tool_choice="required"), 400, "tool_choice", "unsupported_parameter"),
    (chat(functions=[{"name": "f"}]), 400, "functions", "unsupported_parameter"),
    (chat(response_format={"type": "json_object"}), 400, "response_format", "unsupported_parameter"),
    (chat(audio={"voice": "x"}), 400, "audio", "unsupported_parameter"),
    (chat(modalities=["text", "audio"]), 400, "modalities", "unsupported_parameter"),
    (chat(store=0), 400, "store", "unsupported_parameter"),
    (chat(store=True), 400, "store", "unsupported_parameter"),
    (chat(reasoning_effort="high"), 400, "reasoning_effort", "unsupported_parameter"),
    (chat(web_search_options={}), 400, "web_search_options", "unsupported_parameter"),
    (text(prompt=[]), 400, "prompt", "empty_array"),
    (text(prompt=[[]]), 400, "prompt[0]", "empty_array"),
    (text(prompt=[5, "a"]), 400, "prompt[1]", "invalid_type"),
    (text(prompt=["a", 5]), 400, "prompt[1]", "invalid_type"),
    (text(prompt=[-1]), 400, "prompt[0]", "integer_below_min_value"),
    (text(prompt=[49152]), 400, "prompt", "invalid_value"),
    (text(prompt={"text": "a"}), 400, "prompt", "invalid_type"),
    (text(prompt=[5] * 513), 400, "prompt", "context_length_exceeded"),
    (text(prompt=[5] * 500, max_tokens=13), 400, "prompt", "context_length_exceeded"),
    (chat(messages=[{"role": "user", "content": "word " * 600}]), 400, "messages", "context_length_exceeded"),
    (chat(max_tokens=10**30), 400, "messages", "context_length_exceeded"),
]


@pytest.mark.parametrize("stream", [False, True])
async def test_every_wrong_request_is_refused_by_name(http, weight, stream):
    for (path, body), status, param, code in WRONG:
        if stream and "stream" not in body and param != "stream_options":
            body = body | {"stream": True}
        answer = await http.post(path, json=body)
        assert answer.headers["content-type"] == "application/json"
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (status, param, code), (body, error)
        assert error["type"] == "invalid_request_error"
        assert error["message"]
        assert set(error) == {"message", "type", "param", "code", "request_id"}
        assert answer.headers["x-request-id"] == error["request_id"]
    assert weight.requests == []


async def test_the_context_error_has_the_numbers(http):
    answer = await http.post("/v1/completions", json=TEXT | {"prompt": [5] * 600})
    assert answer.json()["error"]["message"] == (
        "This model's maximum context length is 512 tokens. However, your prompt resulted in 600 tokens. "
        "Please reduce the length of the prompt."
    )
    answer = await http.post("/v1/completions", json=TEXT | {"prompt": [5] * 500, "max_tokens": 20})
    assert answer.json()["error"]["message"] == (
        "This model's maximum context length is 512 tokens. However, you requested 520 tokens (500 in the "
        "prompt, 20 in the completion). Please reduce the length of the prompt or completion."
    )


async def test_a_prompt_that_leaves_room_for_one_token_is_taken(http):
    full = await http.post("/v1/completions", json=TEXT | {"prompt": [5] * 512, "max_tokens": 1})
    assert full.status_code == 400
    assert (await http.post("/v1/completions", json=TEXT | {"prompt": [5] * 511, "max_tokens": 1})).is_success


async def test_unknown_arguments_are_worded_as_openai_does(http):
    answer = await http.post("/v1/chat/completions", json=CHAT | {"foo": 1})
    assert answer.json()["error"]["message"] == "Unrecognized request argument supplied: foo"
    answer = await http.post("/v1/chat/completions", json=CHAT | {"foo": 1, "bar": 2})
    assert answer.json()["error"]["message"] == "Unrecognized request arguments supplied: foo, bar"


async def test_no_field_that_openai_knows_is_called_unknown(http):
    from openai.types import completion_create_params
    from openai.types.chat import completion_create_params as chat_params

    for path, body, params in (
        ("/v1/chat/completions", CHAT, chat_params.CompletionCreateParamsStreaming),
        ("/v1/completions", TEXT, completion_create_params.CompletionCreateParamsStreaming),
    ):
        for name in typing.get_type_hints(params):
            # A value that no field takes: whatever is answered must be about this field.
            answer = await http.post(path, json=body | {name: {"no such": "value"}})
            if answer.status_code != 200:  # metadata and the like take any object
                error = answer.json()["error"]
                assert error["param"].startswith(name), (name, error)
                assert error["code"] != "unknown_parameter", (name, error)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nope", b"\xff\xfe", b'{"model": NaN}', b'"\\ud800"', b"[" * 100_000, b"9" * 10_000, b"{}x"],
    ids=["empty", "half", "word", "no utf-8", "nan", "surrogate", "deep", "huge number", "trailing"],
)
async def test_what_is_no_json_is_refused(http, body):
    answer = await http.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert "not valid JSON" in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"[]", b"5", b'"x"', b"null"])
async def test_what_is_no_object_is_refused(http, body):
    answer = await http.post("/v1/completions", content=body)
    assert answer.status_code == 400
    assert "must be an object" in answer.json()["error"]["message"]


async def test_another_content_type_is_refused(http):
    answer = await http.post("/v1/completions", data=TEXT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_content_type")


async def test_paths_and_methods_that_are_not_there(http):
    answer = await http.post("/v1/embeddings", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
    assert answer.json()["error"]["message"] == "Invalid URL (POST /v1/embeddings)"
    answer = await http.get("/v1/chat/completions")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_supported")
    assert answer.headers["allow"] == "POST"
    answer = await http.get("/v1/models/gpt-5")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_the_official_client_gets_its_own_errors(client):
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="gpt-5", messages=HI)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(model="smollm2-135m", messages=[], stream=True)
    assert (wrong.value.param, wrong.value.code) == ("messages", "empty_array")


@pytest.mark.parametrize("size_mb", [5, 10])
async def test_a_body_that_is_too_large_is_refused(http, weight, size_mb):
    body = json.dumps(CHAT | {"messages": [{"role": "user", "content": "x" * (size_mb << 20)}]}).encode()
    answer = await http.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")

    async def unannounced():
        for at in range(0, len(body), 1 << 16):
            yield body[at : at + (1 << 16)]

    answer = await http.post("/v1/chat/completions", content=unannounced())
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert weight.requests == []


async def test_a_client_that_asks_first_need_not_send_a_body_that_is_too_large(router):
    import asyncio

    reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 10000000\r\nexpect: 100-continue\r\n\r\n"
    )
    assert (await asyncio.wait_for(reader.readline(), 2)).startswith(b"HTTP/1.1 413")
    writer.close()


async def test_a_body_just_below_the_limit_is_read(http):
    body = json.dumps(CHAT).encode()
    body = body[:-1] + b" " * ((4 << 20) - len(body)) + b"}"
    answer = await http.post("/v1/chat/completions", content=body)
    assert answer.status_code == 200


def failing(code, detail, after=0):
    async def script(request, context):
        for _ in range(after):
            yield pb.GenerateReply(token_ids=[100])
        await context.abort(code, detail)

    return script


@pytest.mark.parametrize(
    "grpc_code, status, kind, code",
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 400, "invalid_request_error", "invalid_value"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 400, "invalid_request_error", "kv_capacity_exceeded"),
        (grpc.StatusCode.UNAVAILABLE, 503, "server_error", "service_unavailable"),
        (grpc.StatusCode.INTERNAL, 500, "server_error", "weight_node_failed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_weight_node_refuses_has_a_status(http, weight, grpc_code, status, kind, code, stream):
    weight.script = failing(grpc_code, "because")
    answer = await http.post("/v1/chat/completions", json=CHAT | {"stream": stream})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (status, kind, code)
    assert ("retry-after" in answer.headers) == (status == 503)
    if status != 503:
        assert "because" in error["message"]


async def test_an_error_after_the_first_token_is_an_event_and_the_stream_is_not_called_done(http, weight):
    weight.script = failing(grpc.StatusCode.INTERNAL, "gone", after=2)
    answer = await http.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert answer.status_code == 200
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert json.loads(events[0])["choices"]
    error = json.loads(events[-1])["error"]
    assert (error["code"], error["request_id"]) == ("weight_node_failed", answer.headers["x-request-id"])
    assert "[DONE]" not in answer.text


async def test_the_official_client_raises_on_an_error_event(client, weight):
    weight.script = failing(grpc.StatusCode.INTERNAL, "broken", after=2)
    stream = await client.chat.completions.create(model="smollm2-135m", messages=HI, stream=True)
    with pytest.raises(openai.APIError, match="broken"):
        async for _ in stream:
            pass


async def test_an_error_after_the_first_token_of_a_whole_answer_has_a_status(http, weight):
    weight.script = failing(grpc.StatusCode.INTERNAL, "gone", after=2)
    answer = await http.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 500


async def test_a_stream_that_ends_without_a_finish_is_an_error(http, weight):
    async def script(request, context):
        yield pb.GenerateReply(token_ids=[100])

    weight.script = script
    answer = await http.post("/v1/chat/completions", json=CHAT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "weight_node_failed")


async def test_an_aborted_sequence_is_an_error(http, weight, sequence_finish):
    async def script(request, context):
        yield pb.GenerateReply(token_ids=[100])
        yield sequence_finish(request, pb.ABORT, 1)

    weight.script = script
    answer = await http.post("/v1/chat/completions", json=CHAT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "weight_node_failed")


async def test_one_failing_answer_of_several_ends_all(http, weight, says, eventually):
    calm, failed = says([100] * 400, pause_s=0.05), failing(grpc.StatusCode.INTERNAL, "broken", after=1)

    async def script(request, context):
        chosen = failed if request.request_id.endswith("-1") else calm
        async for reply in chosen(request, context):
            yield reply

    weight.script = script
    answer = await http.post("/v1/chat/completions", json=CHAT | {"n": 2})
    assert answer.status_code == 500
    await eventually(lambda: weight.running == 0, within_s=0.5)


async def test_a_request_has_a_deadline(weight, start_router, says, eventually):
    weight.script = says([100] * 400, pause_s=0.05)
    async with start_router("--request-deadline-s", "0.3") as router, httpx.AsyncClient() as http:
        url = f"{router.http}/v1/chat/completions"
        answer = await http.post(url, json=CHAT)
        assert (answer.status_code, answer.json()["error"]["type"]) == (504, "timeout")
        assert answer.headers["x-should-retry"] == "false"
        answer = await http.post(url, json=CHAT | {"stream": True})
        assert answer.status_code == 200
        assert '"deadline_exceeded"' in answer.text.split("\n\n")[-2]
        await eventually(lambda: weight.running == 0)


async def test_a_defect_of_ours_says_nothing_about_itself(http, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("flume_router.http.job.read_chat", broken)
    answer = await http.post("/v1/chat/completions", json=CHAT)
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in answer.text
