"""Bodies that are compressed, large, or too many; pages of other origins; a queue that is full."""

import asyncio
import gzip
import json
import zlib
from contextlib import asynccontextmanager

import httpx
import pytest
from flume_protos.v1 import weight_pb2 as pb
from flume_router.byte_budget import ByteBudget
from flume_router.errors import Overloaded
from flume_router.http.body import Gunzip
from flume_router.http.errors import HttpError

TEXT = {"model": "smollm2-135m", "prompt": "Hi", "max_tokens": 2}
JSON = {"content-type": "application/json"}
DATA = json.dumps(TEXT).encode()


@asynccontextmanager
async def client_of(start_router, *flags):
    async with start_router(*flags) as router, httpx.AsyncClient(base_url=router.http, timeout=10) as http:
        yield http


async def post(http, data, **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await http.post("/v1/completions", content=data, headers=JSON | named)


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip"])
async def test_a_gzip_body_is_read(http, weight, encoding):
    plain = await post(http, DATA)
    packed = await post(http, gzip.compress(DATA), content_encoding=encoding)
    assert packed.status_code == plain.status_code == 200
    assert weight.requests[0].prompt_token_ids == weight.requests[1].prompt_token_ids
    assert (await post(http, DATA, content_encoding="identity")).status_code == 200


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, gzip"])
async def test_other_encodings_are_refused_by_name(http, encoding):
    answer = await post(http, DATA, content_encoding=encoding)
    assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "gzip")
    error = answer.json()["error"]
    assert error["code"] == "unsupported_content_encoding"
    assert f"'{encoding}'" in error["message"]


BROKEN = [DATA, b"\x1f\x8b", gzip.compress(DATA)[:-1], gzip.compress(DATA) + b"more", zlib.compress(DATA)]


@pytest.mark.parametrize("data", BROKEN)
async def test_broken_gzip_is_refused(http, data):
    answer = await post(http, data, content_encoding="gzip")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_encoding")


async def test_what_unpacks_beyond_the_limit_is_refused(http):
    bomb = gzip.compress(b" " * (100 << 20))
    answer = await post(http, bomb, content_encoding="gzip")
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_gzip_of_several_members_is_one_text_and_never_much_more_than_the_limit():
    packed = gzip.compress(b"one, ") + gzip.compress(b"two")
    for step in (1, 7, 1000):
        gunzip = Gunzip(100)
        parts = [gunzip.push(packed[i : i + step]) for i in range(0, len(packed), step)]
        gunzip.finish()
        assert b"".join(parts) == b"one, two"
    assert len(Gunzip(100).push(gzip.compress(b"a" * 1_000_000))) == 101
    with pytest.raises(HttpError, match="ends too early"):
        gunzip = Gunzip(100)
        gunzip.push(packed[:10])
        gunzip.finish()


async def test_bodies_share_a_budget(weight, start_router):
    async with client_of(start_router, "--body-budget-bytes", "100000") as http:
        answer = await post(http, DATA + b" " * 200_000)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["code"] == "overloaded"
        assert (await post(http, DATA)).status_code == 200
        text = (await http.get("/metrics")).text
        assert 'flume_http_refused_total{reason="body_memory"} 1.0' in text
        assert "flume_http_body_bytes 0.0" in text


def test_a_budget_gets_back_what_was_held():
    budget = ByteBudget(10)
    with budget.hold() as held:
        held.add(6)
        with budget.hold() as other:
            with pytest.raises(Overloaded, match="6 bytes"):
                other.add(5)
            other.add(4)
        assert budget.used_bytes == 6
        held.release()
        assert budget.used_bytes == 0
    assert budget.used_bytes == 0


async def test_a_full_queue_is_said_at_once(weight, start_router, eventually):
    go_on = asyncio.Event()

    async def waiting(request, context):
        await go_on.wait()
        yield pb.GenerateReply(token_ids=[100])
        yield pb.GenerateReply(finish=pb.Finish(reason=pb.STOP, completion_tokens=1, prompt_tokens=1))

    weight.script = waiting
    async with client_of(start_router, "--max-waiting-requests", "2") as http:
        held = [asyncio.create_task(post(http, DATA)) for _ in range(2)]
        await eventually(lambda: weight.running == 2)
        answer = await post(http, DATA)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "overloaded"
        text = (await http.get("/metrics")).text
        assert "flume_requests_waiting 2.0" in text
        assert 'flume_http_refused_total{reason="queue"} 1.0' in text
        assert (await http.get("/readyz")).status_code == 200
        go_on.set()
        assert [(await one).status_code for one in held] == [200, 200]
        assert (await post(http, DATA)).status_code == 200


ORIGIN = {"origin": "https://chat.example"}
ASKS = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}


async def test_no_other_origin_may_call_unless_allowed(http):
    assert "access-control-allow-origin" not in (await http.get("/v1/models", headers=ORIGIN)).headers


@pytest.mark.parametrize(
    "flag, allowed", [("*", "*"), ("https://a.example,https://chat.example/", ORIGIN["origin"])]
)
async def test_origins_that_are_allowed_may_call(weight, start_router, flag, allowed):
    async with client_of(start_router, "--cors-origins", flag) as http:
        asked = await http.options("/v1/chat/completions", headers=ORIGIN | ASKS)
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, allowed)
        answer = await http.post("/v1/completions", json=TEXT, headers=ORIGIN)
        assert answer.headers["access-control-allow-origin"] == allowed
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        other = await http.options("/v1/completions", headers={"origin": "https://bad.example"} | ASKS)
        assert (other.status_code == 200) == (flag == "*")
