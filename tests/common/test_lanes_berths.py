"""Berths: lanes whose peers share no fate."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from flume_common.lanes import LaneDown, Port, Side, port_of
from flume_common.layout import KvLayout
from flume_common.wire import Kind, LaneShape
from hosts import why_not

HERE = Path(__file__).parent
LAYOUT = KvLayout(num_layers=2, num_query_heads=4, num_kv_heads=4, head_dim=64, dtype="float32")
SHAPE = LaneShape(LAYOUT, max_step_tokens=8, max_step_sequences=8, kv_frame_bytes=4096)  # lane_flood's, too
KILLS = 25  # one in seven leaves a queue that it shares with others without an end
TRANSPORTS = {"shared memory": "tcp,sm,self", "TCP": "tcp,self"}
numbers = itertools.count(1)


class Floods:
    def __init__(self):
        command = [sys.executable, str(HERE / "lane_flood.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, address, send_lane, size):
        print(json.dumps({"address": address.hex(), "send_lane": send_lane, "bytes": size}),
              file=self.process.stdin, flush=True)  # fmt: skip
        said = json.loads(self.process.stdout.readline())
        return said["pid"], bytes.fromhex(said["address"])


@contextmanager
def floods():
    made = Floods()
    yield made
    made.process.stdin.close()
    made.process.wait(10)


def flood_and_kill(port, floods):
    """A peer that is killed while it sends, with a berth of its own here."""
    number = next(numbers)
    pid, theirs = floods.start(port.berth(number), number, 8000)
    lane = port.connect("flood", theirs, SHAPE, Side.ATTENTION, send_lane=1, receive_lane=number)
    plans, came = lane.receiver(Kind.PLAN), itertools.count()
    enough = 200 + random.randrange(200)

    def take():
        while (frame := plans.poll()) is not None:
            plans.give_back(frame)
            next(came)
        return False

    assert port.wait(lambda: take() or next(came) > enough, 10.0)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(LaneDown):
        port.wait(take, 5.0)
    lane.close()


def joined(one, other):
    """The weight and the attention end of a lane, each at a berth of its own."""
    here, there = next(numbers), next(numbers)
    addresses = one.berth(here), other.berth(there)
    weight = one.connect("attention", addresses[1], SHAPE, Side.WEIGHT, send_lane=there, receive_lane=here)
    attention = other.connect(
        "weight", addresses[0], SHAPE, Side.ATTENTION, send_lane=here, receive_lane=there
    )
    return weight, attention


def carries(one, other, weight, attention, timeout_s=5.0):
    """Whether a PLAN gets through."""
    plans, receiver = weight.sender(Kind.PLAN), attention.receiver(Kind.PLAN)
    plans.send(plans.frame(), 8)
    found, until_s = None, time.monotonic() + timeout_s
    while found is None and time.monotonic() < until_s:
        one.progress()
        other.progress()
        found = receiver.poll()
    if found is not None:
        receiver.give_back(found)
    return found is not None


@pytest.fixture(params=TRANSPORTS.values(), ids=TRANSPORTS)
def ports(request):
    with Port(tls=request.param) as one, Port(tls=request.param) as other:
        yield one, other


def test_peers_killed_while_they_send_take_nobody_elses_messages_with_them():
    with floods() as flooding, Port() as port, Port() as other:
        weight, attention = joined(other, port)
        for kill in range(KILLS):
            flood_and_kill(port, flooding)
            assert carries(other, port, weight, attention), f"after {kill + 1} kills"


def test_berths_that_came_to_nothing_or_to_an_end_leave_nothing_open(ports):
    one, other = ports
    open_fds = []
    for _ in range(24):
        one.berth(number := next(numbers))
        one.leave(number)
        with pytest.raises(ValueError, match="address"):
            one.berth(number := next(numbers))
            one.connect("none", b"", SHAPE, Side.WEIGHT, send_lane=1, receive_lane=number)
        lanes = joined(one, other)
        assert carries(one, other, *lanes)
        for lane in lanes:
            lane.close()
        open_fds.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208
    assert open_fds[-1] <= open_fds[11], open_fds


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_lanes_are_made_after_a_network_card_that_was_there_at_the_start_is_gone():
    done = subprocess.run([sys.executable, str(HERE / "lane_card_gone.py")], capture_output=True, timeout=60)
    assert done.stdout.decode().splitlines()[-1:] == ["carried"], done.stderr.decode()


def test_over_tcp_a_peer_hears_at_once_that_its_lane_was_closed():
    with Port(tls="tcp,self") as one, Port(tls="tcp,self") as other:
        weight, attention = joined(one, other)
        assert carries(one, other, weight, attention)
        attention.close()
        assert one.wait(lambda: not weight.alive, 5.0)


def test_a_sleeper_is_woken_by_a_lane_that_was_made_while_it_slept(monkeypatch):
    monkeypatch.setenv("UCX_KEEPALIVE_INTERVAL", "60s")  # which would wake a sleeper now and then

    def send(port, weight):
        plans = weight.sender(Kind.PLAN)
        plans.send(plans.frame(), 8)
        port.progress()

    def made_and_heard():
        if not second and first[1].receiver(Kind.PLAN).poll() is not None:
            second.extend(joined(late, sleeper))
            threading.Timer(0.7, send, (late, second[0])).start()
        return bool(second) and second[1].receiver(Kind.PLAN).poll() is not None

    with Port() as sleeper, Port() as early, Port() as late:
        first, second = joined(early, sleeper), []
        assert carries(early, sleeper, *first)
        threading.Timer(0.2, send, (early, first[0])).start()
        began_s = time.monotonic()
        assert sleeper.wait(made_and_heard, 10.0)
        assert 0.8 < time.monotonic() - began_s < 5


def test_all_berths_of_a_port_name_it_and_no_other(ports):
    one, other = ports
    names = {port_of(one.berth(next(numbers))) for _ in range(3)} | {port_of(one.address)}
    assert len(names) == 1 and names != {port_of(other.address)}
