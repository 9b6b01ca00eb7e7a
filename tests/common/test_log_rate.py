import io
import json
import logging
import socket
import subprocess
import sys

import pytest
import structlog
from flume_common.log_rate import ALTOGETHER, MAX_KINDS, SUMMARY, TROUBLE, USUAL, Bucket, LogRateLimit, Rate
from flume_common.telemetry import configure_logging


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def told():
    return []


@pytest.fixture
def limit(clock, told):
    return LogRateLimit(lambda kind, count: told.append((kind.event, count)), clock)


def record(event, level=logging.INFO, name="x"):
    return logging.LogRecord(name, level, "file", 1, event, (), None)


def passed(limit, count, *what, **how):
    return sum(limit.filter(record(*what, **how)) for _ in range(count))


def test_a_bucket_gives_its_burst_and_then_its_rate():
    bucket = Bucket(Rate(2, 3), 0.0)
    assert [bucket.take(0.0) for _ in range(4)] == [True, True, True, False]
    assert [bucket.take(1.0) for _ in range(3)] == [True, True, False]
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]


def test_one_kind_of_line_is_bounded_and_others_come_through(limit):
    assert passed(limit, 1000, {"event": "request_answered", "id": 1}) == USUAL.burst
    assert passed(limit, 1000, "accept failed\nsocket 7", logging.ERROR) == TROUBLE.burst
    assert passed(limit, 1, {"event": "engine_ended"}, logging.ERROR) == 1


def test_lines_of_one_event_are_one_kind_whatever_their_fields(limit):
    fields = ({"event": "lane_lost", "node": f"n{number}"} for number in range(500))
    assert sum(limit.filter(record(event, logging.WARNING)) for event in fields) == TROUBLE.burst


def test_kinds_that_have_no_end_share_what_is_left(limit):
    count = sum(limit.filter(record(f"name {number}")) for number in range(10 * MAX_KINDS))
    assert MAX_KINDS < count <= min(MAX_KINDS + USUAL.burst, ALTOGETHER.burst)


def test_all_lines_together_are_bounded(limit):
    lines = [f"kind {number % 100}" for number in range(10_000)]
    assert sum(limit.filter(record(line)) for line in lines) == ALTOGETHER.burst


def test_what_was_suppressed_is_said_with_its_number(limit, clock, told):
    passed(limit, TROUBLE.burst + 70, "disk full", logging.ERROR)
    assert told == []
    clock.now_s += 1
    assert passed(limit, 1, "something else") == 1
    assert told == [("disk full", 70)]
    passed(limit, 200, "disk full", logging.ERROR)
    clock.now_s += 1
    passed(limit, 1, "something else")
    assert len(told) == 1, "not more often than every 10 s"
    limit.flush()
    assert told[1:] == [("disk full", 195)]


def test_a_flood_comes_out_bounded_and_counted_in_the_form_of_all_lines():
    out = io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        configure_logging("router", "r0", stream=out)
        for _ in range(5000):
            logging.getLogger("asyncio").error("socket.accept() out of system resource\nsocket: 7")
        structlog.get_logger("x").info("fine")
        lines = [json.loads(line) for line in out.getvalue().splitlines()]
    finally:
        root.handlers, root.level = before
        structlog.reset_defaults()
    assert [line["event"] for line in lines if line["event"] == "fine"] == ["fine"]
    summaries = [line for line in lines if line["event"] == SUMMARY]  # one, or a few on a slow machine
    assert {(item["of"], item["level"]) for item in summaries} == {
        ("socket.accept() out of system resource", "error")
    }
    suppressed = sum(item["count"] for item in summaries)
    assert suppressed + len(lines) - len(summaries) - 1 == 5000
    assert len(lines) <= TROUBLE.burst + 10


FLOOD = """
import asyncio, resource, socket, sys, time
from flume_common.telemetry import configure_logging
configure_logging("router", "r0")
async def main():
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))
    await asyncio.sleep(1.5)
asyncio.run(main())
"""


def test_a_process_without_descriptors_logs_little_of_it():
    child = subprocess.Popen(
        [sys.executable, "-c", FLOOD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    port = int(child.stdout.readline())
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
    _, err = child.communicate(timeout=20)
    for connection in connections:
        connection.close()
    lines = [json.loads(line) for line in err.splitlines()]
    assert any("socket.accept()" in line["event"] for line in lines)
    assert any(line["event"] == SUMMARY and line["count"] > 1000 for line in lines)
    assert len(lines) < 100
