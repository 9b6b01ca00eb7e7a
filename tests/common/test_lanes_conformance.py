"""What lanes promise, over each transport, with a second process at the other end (lane_peer.py)."""

import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from flume_common.lanes import LaneDown, Port, Side
from flume_common.lanes.ucx import lib
from flume_common.layout import KvLayout
from flume_common.wire import Header, Kind, LaneShape

PEER = Path(__file__).with_name("lane_peer.py")
LAYOUT = KvLayout(num_layers=4, num_query_heads=9, num_kv_heads=3, head_dim=64, dtype="float32")
LARGE = LaneShape(LAYOUT, max_step_tokens=256, max_step_sequences=16, kv_frame_bytes=4 << 20)
SMALL = LaneShape(LAYOUT, max_step_tokens=4, max_step_sequences=16, kv_frame_bytes=1 << 20)
TRANSPORTS = {"shared memory": "tcp,sm,self", "TCP": "tcp,self"}
DEADLINE_S = 10.0
numbers = itertools.count(1)


class PeerProcess:
    """The attention end, and the lanes this end has to it."""

    def __init__(self, port, tls, spin_s=50e-6):
        self.port = port
        self.process = subprocess.Popen(
            [sys.executable, str(PEER), tls, str(spin_s)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.address = bytes.fromhex(self._line())

    @property
    def pid(self):
        return self.process.pid

    def _line(self):
        line = self.process.stdout.readline()
        assert line, "the peer is gone"
        return line.decode().strip()

    def tell(self, do, **args):
        """Send a command without waiting for its answer; a peer that computes answers late."""
        self.process.stdin.write(json.dumps({"do": do, **args}).encode() + b"\n")
        self.process.stdin.flush()

    def ask(self, do, **args):
        """While the peer obeys, this end progresses: over TCP a new endpoint needs both."""
        self.tell(do, **args)
        assert self.port.wait(lambda: False, DEADLINE_S, (self.process.stdout.fileno(),)), (
            f"no answer to {do}"
        )
        return json.loads(self._line())

    def connect(self, shape=LARGE):
        number = next(numbers)
        name, send_lane, receive_lane = f"lane{number}", 2 * number, 2 * number + 1
        lane = self.port.connect(
            name, self.address, shape, Side.WEIGHT, send_lane=send_lane, receive_lane=receive_lane
        )
        self.connect_back(name, shape, receive_lane, send_lane)
        return lane

    def connect_back(self, name, shape, send_lane, receive_lane):
        """The other end's half of a lane."""
        self.ask(
            "connect",
            name=name,
            address=self.port.address.hex(),
            send_lane=send_lane,
            receive_lane=receive_lane,
            tokens=shape.max_step_tokens,
            kv_bytes=shape.kv_frame_bytes,
        )

    def end(self):
        """By its own will, as stdin ends."""
        self.process.stdin.close()
        try:
            self.process.wait(DEADLINE_S)
        finally:
            self.process.kill()
            self.process.stdout.close()


@contextmanager
def joined(tls, **options):
    """A port here and a peer to it."""
    with Port(tls=tls, **options) as port:
        peer = PeerProcess(port, tls, **options)
        try:
            yield peer
        finally:
            peer.end()


@pytest.fixture(scope="module", params=TRANSPORTS.values(), ids=TRANSPORTS)
def tls(request):
    return request.param


@pytest.fixture(scope="module")
def peer(tls):
    """Shared by the tests that do it no harm."""
    with joined(tls) as peer:
        yield peer


@pytest.fixture
def lane(peer):
    lane = peer.connect()
    yield lane
    lane.close()
    peer.ask("close", name=lane.peer)


def send(peer, lane, kind, body, step=0):
    sender = lane.sender(kind)
    assert peer.port.wait(lambda: sender.frame() is not None, DEADLINE_S), f"no free {kind.name} frame"
    frame = sender.frame()
    frame.header[Header.STEP] = step
    frame.body[: len(body)] = body
    sender.send(frame, len(body))


def receive(port, receiver, timeout_s=DEADLINE_S):
    arrived = []

    def ready():
        if not arrived and (frame := receiver.poll()) is not None:
            arrived.append(frame)
        return bool(arrived)

    if not port.wait(ready, timeout_s):
        raise TimeoutError(f"nothing arrived within {timeout_s} s")
    return arrived[0]


def take_partial(peer, lane):
    """(step, body) of the next PARTIAL."""
    receiver = lane.receiver(Kind.PARTIAL)
    frame = receive(peer.port, receiver)
    step, body = int(frame.header[Header.STEP]), frame.body[: frame.header[Header.BODY_BYTES]].copy()
    receiver.give_back(frame)
    return step, body


def take_credit(peer, lane):
    """(step, digest, bytes) of the next CREDIT."""
    receiver = lane.receiver(Kind.CREDIT)
    frame = receive(peer.port, receiver)
    values = tuple(int(word) for word in frame.words[:3])
    receiver.give_back(frame)
    return values


def noise(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def assert_echoes(peer, lane, size=2304, seed=0):
    body = noise(size, seed)
    send(peer, lane, Kind.QUERY, body, step=seed)
    step, answer = take_partial(peer, lane)
    assert step == seed
    assert np.array_equal(answer, 255 - body)


QUERY_SIZES = [0, 1, 28, 29, 2304, 8191, 8192, 65_535, 131_007, 131_008, 131_072, 200_001, 256 * 2304]


@pytest.mark.parametrize("size", QUERY_SIZES)
def test_a_query_of_any_size_comes_back_as_a_partial(peer, lane, size):
    for seed in range(6):  # more often than the ring is long
        assert_echoes(peer, lane, size, seed)


@pytest.mark.parametrize("size", [8, 4096, 100_000, 1 << 20, (4 << 20) - 1, 4 << 20])
def test_keys_and_values_arrive_whole(peer, lane, size):
    for step in range(6):
        body = noise(size, step)
        send(peer, lane, Kind.KV, body, step)
        assert take_credit(peer, lane) == (step, zlib.crc32(body), size)


def test_a_plan_arrives_whole(peer, lane):
    size = LARGE.body_bytes(Kind.PLAN)
    body = noise(size).view(np.int64) >> 16
    send(peer, lane, Kind.PLAN, body.view(np.uint8), step=7)
    assert take_credit(peer, lane) == (7, body.sum(), size)


def test_messages_of_mixed_sizes_arrive_in_the_order_sent(peer, lane):
    sizes = [8, 3000, 70_000, 131_000, 140_000, 300_000, 3_000_000]
    chosen = random.Random(1).choices(sizes, k=150)
    bodies = [noise(size, step) for step, size in enumerate(chosen)]
    answers = []

    def take():
        while (frame := lane.receiver(Kind.CREDIT).poll()) is not None:
            answers.append(tuple(int(word) for word in frame.words[:3]))
            lane.receiver(Kind.CREDIT).give_back(frame)
        return lane.sender(Kind.KV).frame() is not None

    for step, body in enumerate(bodies):
        assert peer.port.wait(take, DEADLINE_S)
        send(peer, lane, Kind.KV, body, step)
    assert peer.port.wait(lambda: take() and len(answers) == len(bodies), DEADLINE_S)
    assert answers == [(step, zlib.crc32(body), len(body)) for step, body in enumerate(bodies)]


def test_a_full_ring_has_no_frame_until_the_receiver_goes_on(peer, lane):
    peer.ask("hold", on=True)
    bodies = [noise(1 << 20, step) for step in range(8)]
    for step, body in enumerate(bodies):  # four fill the receiver's ring, four wait here
        send(peer, lane, Kind.KV, body, step)
    assert not peer.port.wait(lambda: lane.sender(Kind.KV).frame() is not None, 0.2)
    assert_echoes(peer, lane)  # other kinds go on
    peer.ask("hold", on=False)
    for step, body in enumerate(bodies):
        assert take_credit(peer, lane) == (step, zlib.crc32(body), len(body))
    assert lane.sender(Kind.KV).frame() is not None


def test_large_messages_get_through_a_peer_that_computes_in_between(peer, lane):
    bodies = [noise(4 << 20, step) for step in range(8)]
    for step, body in enumerate(bodies):
        peer.tell("compute", seconds=0.03)
        send(peer, lane, Kind.KV, body, step)
    for step, body in enumerate(bodies):
        assert take_credit(peer, lane) == (step, zlib.crc32(body), len(body))
    for _ in bodies:
        assert peer._line() == '"computed"'


def test_lanes_on_one_port_do_not_mix(peer, lane):
    other = peer.connect(SMALL)
    for step in range(20):
        bodies = {each: noise(2304, 2 * step + (each is other)) for each in (lane, other)}
        for each, body in bodies.items():
            send(peer, each, Kind.QUERY, body, step)
        for each in (other, lane):
            step_back, answer = take_partial(peer, each)
            assert step_back == step
            assert np.array_equal(answer, 255 - bodies[each])
    other.close()
    peer.ask("close", name=other.peer)
    assert_echoes(peer, lane)


def test_a_header_is_clean_when_its_frame_comes_round_again(peer, lane):
    for seed in range(1, 10):
        sender = lane.sender(Kind.QUERY)
        assert peer.port.wait(lambda sender=sender: sender.frame() is not None, DEADLINE_S)
        assert not sender.frame().header.any()
        sender.frame().header[:] = seed
        sender.send(sender.frame(), 8)
        take_partial(peer, lane)


def test_misuse_is_refused_and_the_lane_goes_on(peer, lane):
    sender, receiver = lane.sender(Kind.QUERY), lane.receiver(Kind.PARTIAL)
    frame = sender.frame()
    for size in (-1, LARGE.body_bytes(Kind.QUERY) + 1):
        with pytest.raises(ValueError, match="QUERY body"):
            sender.send(frame, size)
    with pytest.raises(ValueError, match="frame"):
        sender.send(lane.sender(Kind.KV).frame(), 8)
    sender.send(frame, 8)
    with pytest.raises(ValueError, match="frame"):
        sender.send(frame, 8)
    answer = receive(peer.port, receiver)
    receiver.give_back(answer)
    with pytest.raises(ValueError, match="frame"):
        receiver.give_back(answer)
    for _ in range(3):
        send(peer, lane, Kind.QUERY, noise(8))
        take_partial(peer, lane)
    with pytest.raises(ValueError, match="frame"):
        sender.send(frame, 8)  # its turn, but frame() did not say that it is free
    assert sender.frame() is frame
    assert_echoes(peer, lane)


def test_a_side_has_only_its_own_channels(lane):
    with pytest.raises(KeyError):
        lane.sender(Kind.PARTIAL)
    with pytest.raises(KeyError):
        lane.receiver(Kind.KV)


@pytest.mark.parametrize("timeout_s", [0.0, 0.0001, 0.01, 0.25])
def test_wait_is_over_in_time(peer, lane, timeout_s):
    start = time.monotonic()
    assert not peer.port.wait(lambda: False, timeout_s)
    assert timeout_s <= time.monotonic() - start < timeout_s + 0.15


def test_wait_wakes_when_a_descriptor_becomes_readable(peer, lane):
    ours, theirs = os.pipe()
    timer = threading.Timer(0.1, os.write, (theirs, b"x"))
    timer.start()
    start = time.monotonic()
    assert peer.port.wait(lambda: False, DEADLINE_S, (ours,))
    assert 0.09 < time.monotonic() - start < 0.5
    assert peer.port.wait(lambda: False, DEADLINE_S, (ours,)), "it is readable still"
    assert not peer.port.wait(lambda: False, 0.05), "nobody asks for it"
    assert peer.port.wait(lambda: False, 0.0, (ours,)), "no time is time enough to look"
    timer.join()
    os.close(ours)
    os.close(theirs)


def test_what_ready_raises_comes_out_of_wait(peer, lane):
    with pytest.raises(ZeroDivisionError):
        peer.port.wait(lambda: bool(1 / 0), 1.0)


def test_shared_memory_carries_a_lane_where_there_is_some(tls, peer, lane):
    assert_echoes(peer, lane)
    assert bool(tcp_connections(peer.pid)) == (tls == TRANSPORTS["TCP"])


def tcp_connections(pid):
    """Inodes of the established TCP sockets of a process."""
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    established = {f"socket:[{row[9]}]" for row in rows if row[3] == "01"}
    return established & {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}


def cpu_s(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_both_ends_sleep_while_nothing_happens(peer, lane):
    assert_echoes(peer, lane)
    theirs, ours = cpu_s(peer.pid), time.process_time()
    assert not peer.port.wait(lambda: False, 1.0)
    assert time.process_time() - ours < 0.05
    assert cpu_s(peer.pid) - theirs < 0.05


def test_waiting_for_a_peer_that_takes_nothing_costs_little(peer):
    lanes = [peer.connect() for _ in range(4)]
    os.kill(peer.pid, signal.SIGSTOP)
    try:
        for lane in lanes:  # 4 MB, more than fits a queue in shared memory
            for kind, _ in itertools.product((Kind.QUERY, Kind.KV), range(4)):
                send(peer, lane, kind, noise(130_000))
        start = time.process_time()
        assert not peer.port.wait(lambda: False, 1.0)
        assert time.process_time() - start < 0.2
    finally:
        os.kill(peer.pid, signal.SIGCONT)
    for lane in lanes:
        for _ in range(4):
            assert take_credit(peer, lane)[1] == zlib.crc32(noise(130_000))
            take_partial(peer, lane)
        lane.close()
        peer.ask("close", name=lane.peer)


def test_no_wake_up_is_lost_between_two_sleepers(tls, monkeypatch):
    monkeypatch.setenv("UCX_KEEPALIVE_INTERVAL", "60s")  # which would wake a sleeper now and then
    with joined(tls, spin_s=0.0) as peer:
        lane = peer.connect()
        for seed in range(600):
            assert_echoes(peer, lane, (8, 2304, 20_000, 140_000)[seed % 4], seed)


def test_a_killed_peer_takes_its_lane_down_and_no_other(tls, peer, lane):
    victim = PeerProcess(peer.port, tls)
    doomed = victim.connect()
    assert_echoes(victim, doomed)
    victim.ask("hold", on=True)
    for step in range(6):  # some of it received, some of it half way
        send(victim, doomed, Kind.KV, noise(4 << 20), step)
    victim.process.send_signal(signal.SIGKILL)  # and not reaped: it stays a zombie
    start = time.monotonic()
    with pytest.raises(LaneDown, match=doomed.peer):
        receive(peer.port, doomed.receiver(Kind.CREDIT), DEADLINE_S)
    assert time.monotonic() - start < doomed.NOTICE_S
    assert not doomed.alive
    reason = doomed.error
    with pytest.raises(LaneDown):
        doomed.sender(Kind.QUERY).frame()
    assert_echoes(peer, lane)
    doomed.close()
    assert doomed.error == reason
    victim.end()
    assert_echoes(peer, lane, 400_000, 1)


def test_a_killed_peer_is_noticed_without_a_pidfd(tls, monkeypatch):
    monkeypatch.setattr("flume_common.lanes.port.Process.open", lambda process: None)
    with joined(tls) as peer:
        lane = peer.connect()
        assert_echoes(peer, lane)
        start = time.monotonic()
        peer.process.kill()
        peer.process.wait()
        with pytest.raises(LaneDown):
            receive(peer.port, lane.receiver(Kind.PARTIAL), DEADLINE_S)
        assert time.monotonic() - start < lane.NOTICE_S
        assert "reset" in lane.error


def test_a_message_sent_before_the_death_is_still_delivered(peer, tls):
    victim = PeerProcess(peer.port, tls)
    lane = victim.connect()
    assert victim.ask("unasked", kind="CREDIT", name=lane.peer, times=3, size=8) == 3
    peer.port.progress()
    victim.process.kill()
    assert peer.port.wait(lambda: not lane.alive, DEADLINE_S)
    for _ in range(3):
        assert lane.receiver(Kind.CREDIT).poll() is not None
    with pytest.raises(LaneDown):
        lane.receiver(Kind.CREDIT).poll()
    lane.close()
    victim.end()


def test_a_lane_to_a_process_that_ended_is_down_from_the_start(peer, tls):
    victim = PeerProcess(peer.port, tls)
    victim.end()
    lane = peer.port.connect(
        "gone", victim.address, SMALL, Side.WEIGHT, send_lane=10**6, receive_lane=10**6 + 1
    )
    assert not lane.alive
    assert "ended" in lane.error
    for use in (lane.sender(Kind.QUERY).frame, lane.receiver(Kind.PARTIAL).poll):
        with pytest.raises(LaneDown):
            use()
    lane.close()


@pytest.mark.parametrize("size", [100_000, 500_000])
def test_a_message_larger_than_its_frame_takes_the_lane_down(peer, lane, size):
    number = 10**8 + next(numbers)
    odd = peer.port.connect(
        "odd", peer.address, SMALL, Side.WEIGHT, send_lane=number, receive_lane=number + 10**8
    )
    peer.connect_back("odd", LARGE, send_lane=number + 10**8, receive_lane=number)
    peer.ask("unasked", kind="PARTIAL", name="odd", times=1, size=size)
    with pytest.raises(LaneDown, match="PARTIAL failed"):
        receive(peer.port, odd.receiver(Kind.PARTIAL))
    odd.close()
    peer.ask("close", name="odd")
    assert_echoes(peer, lane)


def test_a_stopped_peer_is_waited_for_and_answers_when_it_goes_on(peer, lane):
    os.kill(peer.pid, signal.SIGSTOP)
    send(peer, lane, Kind.QUERY, noise(300_000), step=3)
    with pytest.raises(TimeoutError):
        receive(peer.port, lane.receiver(Kind.PARTIAL), 0.5)
    assert lane.alive
    os.kill(peer.pid, signal.SIGCONT)
    step, answer = take_partial(peer, lane)
    assert step == 3
    assert np.array_equal(answer, 255 - noise(300_000))


def test_a_lane_closes_at_once_while_its_peer_stands_still(peer, lane):
    other = peer.connect()
    peer.ask("hold", on=True)
    os.kill(peer.pid, signal.SIGSTOP)
    for step in range(4):
        send(peer, other, Kind.KV, noise(4 << 20), step)
    start = time.monotonic()
    other.close()
    assert time.monotonic() - start < 0.5
    os.kill(peer.pid, signal.SIGCONT)
    peer.ask("hold", on=False)
    peer.ask("close", name=other.peer)
    assert_echoes(peer, lane)


def test_a_closed_lane_says_so_and_closing_again_changes_nothing(peer):
    lane = peer.connect()
    frame = lane.sender(Kind.QUERY).frame()
    lane.close()
    lane.close()
    assert not lane.alive
    assert lane.error == "closed by this end"
    frame.body[:] = 1  # still memory
    for use in (
        lane.sender(Kind.QUERY).frame,
        lambda: lane.sender(Kind.QUERY).send(frame, 8),
        lane.receiver(Kind.PARTIAL).poll,
    ):
        with pytest.raises(LaneDown, match="closed by this end"):
            use()
    peer.ask("close", name=lane.peer)


def test_messages_for_a_closed_lane_do_not_pile_up(peer, lane):
    closed = peer.connect(SMALL)
    assert_echoes(peer, closed)
    peer.tell("unasked", kind="CREDIT", name=closed.peer, times=500, size=8)
    closed.close()  # while they come
    peer.port.wait(lambda: False, DEADLINE_S, (peer.process.stdout.fileno(),))
    peer._line()
    peer.ask("close", name=closed.peer)
    peer.connect(SMALL).close()
    assert not anything_unclaimed(peer.port)
    assert_echoes(peer, lane)


def anything_unclaimed(port):
    """Does UCX keep a message of any lane that nobody has posted a receive for?"""
    return port._shared.worker.tag_probe(lib.UCXXTag(0), lib.UCXXTagMask(0)).matched


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_a_port_closes_at_once_whatever_a_peer_left_half_sent(tls, fate):
    with joined(tls) as peer:
        lane = peer.connect()
        peer.connect_back("unknown", LARGE, send_lane=10**9, receive_lane=10**9 + 1)
        for name, times in ((lane.peer, 7), ("unknown", 4)):  # four fill a ring, the others nobody receives
            assert peer.ask("unasked", kind="PARTIAL", name=name, times=times, size=500_000) == times
        peer.port.wait(lambda: False, 0.05)
        assert anything_unclaimed(peer.port)
        peer.process.send_signal(fate)
        berth = peer.port._shared

        def close():
            peer.port.close()
            vars(berth._strays).clear()  # the last that could hold the worker

        closing = threading.Thread(target=close, daemon=True)
        closing.start()
        closing.join(2.0)
        assert not closing.is_alive()
        peer.process.kill()


def resident_bytes(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def test_fifty_reconnections_leave_memory_and_descriptors_flat(tls):
    with joined(tls) as peer:
        seen = []
        for turn in range(50):
            lane = peer.connect(SMALL)
            for step in range(3):
                send(peer, lane, Kind.KV, noise(1 << 20, turn), step)
            assert_echoes(peer, lane, seed=turn)
            lane.close()
            peer.ask("close", name=lane.peer)
            processes = (os.getpid(), peer.pid)
            seen.append([
                *(resident_bytes(pid) >> 20 for pid in processes),
                *(sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()) for pid in processes),
            ])  # fmt: skip
        growth = [last - early for last, early in zip(seen[-1], seen[9], strict=True)]
        assert max(growth[:2]) < 12, f"MiB of both processes by turn: {seen}"
        assert max(growth[2:]) <= 2, f"descriptors of both processes by turn: {seen}"


LEAVE = """
import sys
from flume_common.lanes import *
from flume_common.layout import KvLayout
from flume_common.wire import *
shape = LaneShape(KvLayout(4, 9, 3, 64, "float32"), 16, 4, 1 << 20)
here, there = Port(tls=sys.argv[1]), Port(tls=sys.argv[1])
ours = here.connect("there", there.address, shape, Side.WEIGHT, send_lane=1, receive_lane=2)
theirs = there.connect("here", here.address, shape, Side.ATTENTION, send_lane=2, receive_lane=1)
for size in (100, 1 << 20, 1 << 20):
    sender = ours.sender(Kind.KV)
    sender.send(sender.frame(), size)
    there.progress(), here.progress()
arrived = theirs.receiver(Kind.KV).poll()
if sys.argv[2] == "closing":
    there.close(), here.close(), here.close()
"""


@pytest.mark.parametrize("how", ["closing", "not closing"])
def test_an_interpreter_exits_quietly_with_lanes_open(tls, how):
    done = subprocess.run([sys.executable, "-c", LEAVE, tls, how], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
