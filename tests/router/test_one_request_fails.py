"""What fails within one request, at a weight node or here, ends that request with an error, and no other."""

import asyncio
import json

import grpc
import pytest
import structlog
from flume_protos.v1 import weight_pb2 as pb
from flume_router import chat_template, detokenizer
from flume_router.http import completions

TEXT = {"model": "smollm2-135m", "prompt": "Hi", "max_tokens": 5}
CHAT = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hi"}]}
WHY = "the model produced NaN logits at token 3 of the answer (position 12)"


def fails_after(tokens, failure, code=grpc.StatusCode.INTERNAL):
    async def script(request, context):
        for token in range(tokens):
            yield pb.GenerateReply(token_ids=[1000 + token])
        await context.abort(code, WHY, (("flume-failure", failure),))

    return script


@pytest.mark.parametrize("failure", ["model_output_invalid", "sequence_failed", "engine_crashed"])
async def test_a_sequence_that_fails_at_its_weight_node_is_a_500_with_the_cause_and_is_not_tried_again(
    http, weight, failure
):
    weight.script = fails_after(0, failure)
    reply = await http.post("/v1/completions", json=TEXT)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["code"]) == (500, "server_error", failure)
    assert error["message"] == WHY and error["request_id"]
    assert reply.headers["x-should-retry"] == "false"
    assert len(weight.requests) == 1


async def test_in_the_middle_of_a_stream_it_is_an_error_event(http, weight):
    weight.script = fails_after(2, "model_output_invalid")
    reply = await http.post("/v1/completions", json=TEXT | {"stream": True})
    events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    assert json.loads(events[-1])["error"]["code"] == "model_output_invalid"
    assert "[DONE]" not in events and len(events) == 3


@pytest.mark.parametrize(
    "broken",
    [
        (detokenizer.Detokenizer, "push", "/v1/completions", TEXT),
        (completions, "completion_logprobs", "/v1/completions", TEXT | {"logprobs": 1}),
        (chat_template.ChatTemplate, "render", "/v1/chat/completions", CHAT),
    ],
    ids=["detokeniser", "logprobs", "template"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_defect_here_ends_one_request_and_is_logged_under_its_id(http, monkeypatch, broken, stream):
    where, name, path, body = broken
    with monkeypatch.context() as patch, structlog.testing.capture_logs() as said:
        patch.setattr(where, name, lambda *_, **__: {}["no such thing"])
        reply = await http.post(path, json=body | {"stream": stream})
    assert '"error"' in reply.text and '"request_id"' in reply.text, reply.text
    assert reply.status_code == 500 or stream
    assert any(line.get("exc_info") for line in said)
    after = await asyncio.gather(*(http.post("/v1/completions", json=TEXT) for _ in range(3)))
    assert [each.status_code for each in after] == [200] * 3
