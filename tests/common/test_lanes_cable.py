"""Lanes over TCP to another host whose cable is cut: silence in both directions, and nobody who says so.

To be run alone, `pytest -m soak tests/common/test_lanes_cable.py`: UCX looks for network cards once in a
process, and in the whole suite others would have used it before there is this one.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from flume_common.lanes import Port, Side
from flume_common.layout import KvLayout
from flume_common.wire import Header, Kind, LaneShape

sys.path.insert(0, str(Path(__file__).parent.parent))
from hosts import host, why_not

pytestmark = [pytest.mark.soak, pytest.mark.skipif(bool(why_not()), reason=why_not())]

PEER = Path(__file__).with_name("lane_peer.py")
LAYOUT = KvLayout(num_layers=4, num_query_heads=9, num_kv_heads=3, head_dim=64, dtype="float32")
SHAPE = LaneShape(LAYOUT, max_step_tokens=256, max_step_sequences=16, kv_frame_bytes=4 << 20)
DEADLINE_S = 10.0


@pytest.fixture(scope="module")
def there():
    with ExitStack() as stack:
        try:
            there = stack.enter_context(host())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this kernel gives us no network namespace: {error.stderr.strip()}")
        yield there


class FarPeer:
    """lane_peer.py over there; the pipes to it are no part of the network."""

    def __init__(self, there, port):
        self._port = port
        self._numbers = itertools.count(1)
        words = there.command(sys.executable, str(PEER), "tcp", "0.00005", there.address)
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._address = bytes.fromhex(self._process.stdout.readline().decode())

    def connect(self):
        ours, theirs = next(self._numbers), next(self._numbers)
        lane = self._port.connect(
            f"lane{ours}", self._address, SHAPE, Side.WEIGHT, send_lane=ours, receive_lane=theirs
        )
        command = {
            "do": "connect", "name": lane.peer, "address": self._port.address.hex(), "send_lane": theirs,
            "receive_lane": ours, "tokens": SHAPE.max_step_tokens, "kv_bytes": SHAPE.kv_frame_bytes,
        }  # fmt: skip
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        assert self._port.wait(lambda: False, DEADLINE_S, (self._process.stdout.fileno(),))
        assert b"connected" in self._process.stdout.readline()
        return lane

    def end(self):
        self._process.stdin.close()
        try:
            self._process.wait(DEADLINE_S)
        finally:
            self._process.kill()


@pytest.fixture
def port(there):
    """On the card of our end of the cable alone, as the peer is on theirs."""
    with Port(tls="tcp,sm,self", host=there.gateway) as port:
        yield port


@pytest.fixture
def peer(there, port):
    peer = FarPeer(there, port)
    yield peer
    there.mend()
    peer.end()


def send(port, lane, kind, size, step):
    sender = lane.sender(kind)
    assert port.wait(lambda: sender.frame() is not None, DEADLINE_S)
    frame = sender.frame()
    frame.header[Header.STEP] = step
    frame.body[:size] = step
    sender.send(frame, size)


def answered_step(port, lane, timeout_s=DEADLINE_S):
    """The step of the next PARTIAL, whose bytes are right; None when none comes in time."""
    receiver, found = lane.receiver(Kind.PARTIAL), []

    def arrived():
        if not found and (frame := receiver.poll()) is not None:
            found.append(frame)
        return bool(found)

    if not port.wait(arrived, timeout_s):
        return None
    step, size = int(found[0].header[Header.STEP]), found[0].header[Header.BODY_BYTES]
    assert size and np.all(found[0].body[:size] == 255 - step)
    receiver.give_back(found[0])
    return step


def test_what_is_sent_while_a_cable_is_out_arrives_in_order_when_it_is_back(there, port, peer):
    lane = peer.connect()
    send(port, lane, Kind.QUERY, 2304, step=1)
    assert answered_step(port, lane) == 1
    there.cut()
    send(port, lane, Kind.QUERY, 2304, step=2)
    send(port, lane, Kind.QUERY, 300_000, step=3)
    assert answered_step(port, lane, 1.0) is None and lane.alive
    there.mend()
    assert [answered_step(port, lane) for _ in range(2)] == [2, 3]


def test_a_lane_closes_at_once_while_the_cable_is_out_and_another_is_made_when_it_is_back(there, port, peer):
    lane = peer.connect()
    send(port, lane, Kind.QUERY, 2304, step=1)
    assert answered_step(port, lane) == 1
    there.cut()
    for step in range(4):
        send(port, lane, Kind.KV, 4 << 20, step)
    began_s = time.monotonic()
    lane.close()
    assert time.monotonic() - began_s < 0.5
    there.mend()
    other = peer.connect()
    send(port, other, Kind.QUERY, 2304, step=7)
    assert answered_step(port, other) == 7
