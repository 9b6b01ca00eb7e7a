"""Connections that send slowly, not at all, no HTTP, or too many at a time: over bare sockets."""

import asyncio
import contextlib
import errno
import json
import socket
import time

import httpx
import pytest
from flume_common.listening import bind
from flume_protos.v1 import weight_pb2 as pb
from flume_router.http.accept import accept
from flume_router.http.door import Door
from flume_router.http.limits import HttpLimits, connection_limit
from flume_router.http.refusals import Refusals

TEXT = json.dumps({"model": "smollm2-135m", "prompt": "Hi", "max_tokens": 2}).encode()
STREAM = json.dumps({"model": "smollm2-135m", "prompt": "Hi", "stream": True}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
SOON_S = 3.0


def request(data, *headers):
    return HEAD + b"".join(h + b"\r\n" for h in headers) + b"content-length: %d\r\n\r\n" % len(data) + data


class Client:
    """A bare connection."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    def send(self, data):
        self.writer.write(data)

    async def rest(self, within_s=SOON_S):
        """Everything until the router closes, with or without a reset."""
        got = b""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(within_s):
                while data := await self.reader.read(1 << 16):
                    got += data
        return got

    async def drip(self, data, every_s=0.05):
        """Sends it again and again until the router closes; what it said meanwhile."""
        reading = asyncio.create_task(self.rest(10))
        while not reading.done():
            self.send(data)
            await asyncio.wait([reading], timeout=every_s)
        return reading.result()

    def close(self):
        self.writer.close()


@pytest.fixture
async def connect():
    opened = []

    async def to(router):
        client = Client(*await asyncio.open_connection("127.0.0.1", router.port))
        opened.append(client)
        return client

    yield to
    for client in opened:
        client.close()


def parted(answer):
    """Status and error of an answer that is refused."""
    head, _, data = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    error = json.loads(data)["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    return int(head.split(b" ")[1]), error


async def metric(router, reason):
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"{router.http}/metrics")).text
    [value] = [
        line
        for line in text.splitlines()
        if line.startswith(f'flume_http_refused_total{{reason="{reason}"}}')
    ]
    return float(value.split()[-1])


async def test_a_connection_that_says_nothing_is_closed(weight, start_router, connect):
    async with start_router("--header-timeout-s", "0.3") as router:
        client = await connect(router)
        began = time.monotonic()
        assert await client.rest() == b""
        assert time.monotonic() - began > 0.25
        assert await metric(router, "header_timeout") == 1


async def test_headers_have_a_time_limit_however_they_drip(weight, start_router, connect):
    async with start_router("--header-timeout-s", "0.4") as router:
        client = await connect(router)
        client.send(HEAD)
        began = time.monotonic()
        assert await client.drip(b"x: y\r\n") == b""
        assert 0.3 < time.monotonic() - began < 2
        assert await metric(router, "header_timeout") == 1


async def test_so_have_those_of_a_later_request(weight, start_router, connect):
    async with start_router("--header-timeout-s", "0.4") as router:
        client = await connect(router)
        for _ in range(3):
            client.send(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            assert await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\nok"), SOON_S)
            await asyncio.sleep(0.2)
        assert await client.drip(b"GET /") == b""


async def test_a_body_has_a_time_limit_however_it_drips(weight, start_router, connect):
    async with start_router("--body-timeout-s", "0.4") as router:
        client = await connect(router)
        client.send(HEAD + b"content-length: 4000\r\n\r\n{")
        began = time.monotonic()
        assert await client.drip(b" ") == b""
        assert 0.3 < time.monotonic() - began < 2
        assert await metric(router, "body_timeout") == 1
        assert weight.requests == []


async def test_a_body_that_is_only_slow_is_told_so(weight, start_router, connect):
    async with start_router("--body-timeout-s", "1") as router:
        client = await connect(router)
        client.send(HEAD + b"content-length: 400000\r\n\r\n{")
        status, error = parted(await client.drip(b" " * 1000))
        assert (status, error["code"]) == (408, "request_timeout")
        assert "did not arrive within 2 s" in error["message"]
        assert await metric(router, "body_timeout") == 1


@pytest.mark.parametrize("data", [HEAD, HEAD + b"content-length: 50\r\n\r\n{"])
async def test_a_request_that_ends_too_early_is_refused(router, connect, data):
    client = await connect(router)
    client.send(data)
    client.writer.write_eof()
    assert parted(await client.rest())[0] == 400


@pytest.mark.parametrize("path", [b"/nowhere", b"/livez"])
async def test_a_body_that_nobody_reads_is_not_waited_for(router, connect, monkeypatch, path):
    monkeypatch.setattr("flume_router.http.connection._LINGER_S", 0.3)
    client = await connect(router)
    client.send(b"POST " + path + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 4000\r\n\r\n{")
    began = time.monotonic()
    assert (await client.drip(b" ")).startswith(b"HTTP/1.1 40")
    assert time.monotonic() - began < 2


async def test_a_request_over_its_deadline_ends_its_connection_too(
    weight, start_router, connect, monkeypatch
):
    monkeypatch.setattr("flume_router.http.connection._LINGER_S", 0.3)
    async with start_router("--request-deadline-s", "1") as router:
        client = await connect(router)
        client.send(HEAD + b"content-length: 4000\r\n\r\n{")
        assert parted(await client.drip(b" "))[0] == 504


async def test_an_idle_connection_is_closed_after_its_time(weight, start_router, connect):
    async with start_router("--idle-timeout-s", "0.4") as router:
        client = await connect(router)
        client.send(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        began = time.monotonic()
        assert (await client.rest()).endswith(b"ok")
        assert 0.3 < time.monotonic() - began < 2


async def test_a_reader_that_stops_is_cut_off(weight, start_router, text_model, eventually):
    [spaces] = text_model.tokenizer.encode_now(" " * 32, add_special_tokens=False)

    async def endless(request, context):
        while True:
            yield pb.GenerateReply(token_ids=[spaces] * 1000)

    weight.script = endless
    async with start_router("--write-timeout-s", "0.5") as router:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", router.port))
            client.sendall(request(STREAM))
            await eventually(lambda: weight.running == 1)
            await eventually(lambda: weight.running == 0, within_s=10)
            assert await metric(router, "write_timeout") == 1


NO_HTTP = [
    (b"\x16\x03\x01\x02\x00\x01\x00", 400),
    (b"HELLO\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 500_000, 431),
    (HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n{}", 400),
    (HEAD + b"content-length: -5\r\n\r\n{}", 400),
    (HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n{}", 501),
    (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 400),
    (b"PRI * HTTP/2.0\r\nhost: x\r\n\r\n", 505),
    (HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\n{xx", 400),
]


@pytest.mark.parametrize("data, status", NO_HTTP)
async def test_what_is_no_http_is_refused_in_our_form(router, connect, data, status, capsys):
    client = await connect(router)
    client.send(data + b"\x00" * 300_000)  # still being sent when it is refused
    refused, error = parted(await client.rest())
    assert (refused, error["type"]) == (status, "invalid_request_error")
    assert await metric(router, "malformed") == (status != 505)
    assert "Invalid HTTP" not in capsys.readouterr().out


async def test_no_http_ends_the_connection_though_the_client_stays(router, connect, monkeypatch, eventually):
    monkeypatch.setattr("flume_router.http.connection._LINGER_S", 0.3)
    client = await connect(router)
    client.send(b"HELLO\r\n\r\n")
    await client.rest()
    text = ""
    async with httpx.AsyncClient() as http:
        for _ in range(20):
            await asyncio.sleep(0.1)
            text = (await http.get(f"{router.http}/metrics")).text
            if 'flume_http_connections{state="idle"} 0.0' in text and '{state="active"} 1.0' in text:
                return
    raise AssertionError(text)


@pytest.mark.parametrize("data", [TEXT, STREAM])
@pytest.mark.parametrize("wait_s, interim", [(0.0, b""), (0.8, b"HTTP/1.1 100 Continue\r\n\r\n")])
async def test_a_client_that_ends_its_side_gets_its_answer(
    weight, router, connect, says, data, wait_s, interim
):
    said = says("Hello there.")

    async def late(request, context):
        await asyncio.sleep(wait_s)
        async for reply in said(request, context):
            yield reply
            await asyncio.sleep(0.05)

    weight.script = late
    client = await connect(router)
    client.send(request(data))
    await client.writer.drain()
    client.writer.write_eof()
    answer = await client.rest(10)
    before, _, answer = answer.partition(b"HTTP/1.1 200")
    # The interim response comes only where the answer does not come soon.
    assert before == b"HTTP/1.1 100 Continue\r\n\r\n" or (before == b"" and not wait_s)
    if data is STREAM:
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    else:
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["finish_reason"] == "length"


async def test_ending_ones_side_between_two_tokens_is_answered_too(weight, router, connect, eventually):
    go_on = asyncio.Event()

    async def pausing(request, context):
        yield pb.GenerateReply(token_ids=[100])
        await go_on.wait()
        yield pb.GenerateReply(finish=pb.Finish(reason=pb.STOP, completion_tokens=1, prompt_tokens=1))

    weight.script = pausing
    client = await connect(router)
    client.send(request(STREAM))
    await client.reader.readuntil(b"data: ")
    client.writer.write_eof()
    await asyncio.sleep(0.5)
    assert weight.running == 1
    go_on.set()
    answer = await client.rest()
    assert b"\n:\n\n" in answer
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_going_away_between_two_tokens_is_seen(weight, router, connect, eventually):
    async def pausing(request, context):
        yield pb.GenerateReply(token_ids=[100])
        await asyncio.sleep(60)

    weight.script = pausing
    client = await connect(router)
    client.send(request(STREAM))
    await client.reader.readuntil(b"data: ")
    client.close()
    assert await eventually(lambda: weight.running == 0) < 0.5


async def test_one_connection_too_many_is_told_so_and_probes_are_answered(weight, start_router, connect):
    async with start_router("--max-connections", "3") as router:
        held = [await connect(router) for _ in range(3)]
        for client in held:
            client.send(HEAD)
        await asyncio.sleep(0.2)
        late = await connect(router)
        late.send(request(TEXT))
        status, error = parted(await late.rest())
        assert (status, error["code"]) == (503, "overloaded")
        probe = await connect(router)
        probe.send(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = await probe.rest()
        assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"ok")
        silent = await connect(router)
        began = time.monotonic()
        assert await silent.rest() == b""
        assert time.monotonic() - began > 0.3
        held[0].close()
        await asyncio.sleep(0.2)
        again = await connect(router)
        again.send(request(TEXT, b"connection: close"))
        assert (await again.rest()).startswith(b"HTTP/1.1 200")
        assert await metric(router, "connections") == 1


async def test_idle_connections_give_way_first(weight, start_router, connect):
    async with start_router("--max-connections", "3") as router:
        idle = [await connect(router) for _ in range(3)]
        for client in idle:
            client.send(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            await client.reader.readuntil(b"\r\n\r\nok")
        more = [await connect(router) for _ in range(2)]
        for client in more:
            client.send(request(TEXT, b"connection: close"))
            assert (await client.rest()).startswith(b"HTTP/1.1 200")
        assert await idle[0].rest() == b""
        idle[2].send(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert (await idle[2].rest()).endswith(b"ok")


async def test_far_more_connections_than_allowed_wait_or_are_refused(weight, start_router, connect):
    async with start_router("--max-connections", "2", "--header-timeout-s", "1") as router:
        clients = [await connect(router) for _ in range(200)]
        for client in clients:
            client.send(HEAD)
        answers = await asyncio.gather(*(client.rest(30) for client in clients))
        assert all(answer[:12] in (b"", b"HTTP/1.1 408") for answer in answers)
        again = await connect(router)
        again.send(request(TEXT, b"connection: close"))
        assert (await again.rest()).startswith(b"HTTP/1.1 200")


async def test_without_descriptors_accepting_pauses_and_is_logged_once(monkeypatch, capsys):
    loop, door = asyncio.get_running_loop(), Door(HttpLimits(), Refusals())
    tried, sock_accept = [], loop.sock_accept

    async def full(bound):
        tried.append(1)
        if len(tried) <= 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return await sock_accept(bound)

    monkeypatch.setattr("flume_router.http.accept._PAUSE_S", 0.05)
    monkeypatch.setattr(loop, "sock_accept", full)
    made = loop.create_future()

    def protocol():
        made.set_result(None)
        return asyncio.Protocol()

    bound = bind("127.0.0.1:0")
    accepting = asyncio.create_task(accept(bound, door, protocol))
    began = time.monotonic()
    _, writer = await asyncio.open_connection(*bound.getsockname())
    await asyncio.wait_for(made, SOON_S)
    assert time.monotonic() - began > 0.14
    accepting.cancel()
    await asyncio.wait([accepting])
    writer.close()
    bound.close()
    assert door.refusals.counts["descriptors"] == 3
    assert capsys.readouterr().out.count("connections_not_accepted") == 1


@pytest.mark.parametrize(
    "descriptors, asked, limit",
    [(1 << 20, 0, 4096), (1 << 20, 9000, 9000), (256, 0, 160), (256, 9000, 160), (256, 5, 5), (40, 0, 1)],
)
def test_connections_leave_descriptors_for_the_rest(descriptors, asked, limit):
    assert connection_limit(descriptors, asked) == limit
