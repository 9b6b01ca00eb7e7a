"""Any JSON at all is either a request or a BadRequest, never a defect of ours."""

import json

import hypothesis.strategies as st
from flume_router.errors import BadRequest
from flume_router.http.schema import read_chat, read_completion
from hypothesis import HealthCheck, given, settings

CHAT = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "smollm2-135m", "prompt": "Hi"}
FIELDS = [
    "model", "messages", "prompt", "stream", "stream_options", "n", "stop", "seed", "temperature", "top_p",
    "max_tokens", "max_completion_tokens", "presence_penalty", "frequency_penalty", "logit_bias", "user",
    "logprobs", "top_logprobs", "top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens",
    "stop_token_ids", "echo", "best_of", "suffix", "tools", "response_format", "audio", "metadata", "store",
    "foo", "",
]  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, -(2**63), 10**40, 0.5, 1e308, -0.0])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    | st.sampled_from(["user", "text", "auto", "smollm2-135m"])
)
KEYS = st.sampled_from(["role", "content", "type", "text", "name", "include_usage", "5", "x", ""])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
BODIES = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5)
FAST = settings(max_examples=400, deadline=None)


@FAST
@given(changes=BODIES, base=st.sampled_from([CHAT, {}]))
def test_any_chat_body_is_read_or_refused(changes, base):
    _read_or_refuse(read_chat, {**base, **changes})


@FAST
@given(changes=BODIES, base=st.sampled_from([TEXT, {}]))
def test_any_completion_body_is_read_or_refused(changes, base):
    _read_or_refuse(read_completion, {**base, **changes})


def _read_or_refuse(read, body):
    try:
        request = read(body)
    except BadRequest as error:
        assert error.code
        assert len(error.message) < 2000
    else:
        assert request.common.sampling.IsInitialized()


async def _never_a_defect(http, path, body):
    answer = await http.post(path, json=body)
    assert answer.status_code in (200, 400, 404), (body, answer.text)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code", "request_id"}


OVER_HTTP = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@OVER_HTTP
@given(changes=BODIES)
async def test_no_chat_body_is_a_defect(http, changes):
    await _never_a_defect(http, "/v1/chat/completions", {**CHAT, **changes})


@OVER_HTTP
@given(changes=BODIES)
async def test_no_completion_body_is_a_defect(http, changes):
    await _never_a_defect(http, "/v1/completions", {**TEXT, **changes})


@OVER_HTTP
@given(body=st.binary(max_size=40) | VALUES.map(lambda value: json.dumps(value).encode()))
async def test_no_bytes_are_a_defect(http, body):
    answer = await http.post("/v1/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
