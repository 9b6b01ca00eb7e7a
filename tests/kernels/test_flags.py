"""The host's end of flags, against a device that is simulated with the counting of the kernels."""

import threading
import time

import pytest
import torch
from flume_kernels.gpu.device import Flags, capture
from flume_kernels.gpu.flags import FLAG_STRIDE_BYTES, POISON, FlagBlock, Poisoned
from flume_kernels.gpu.watchdog import Watchdog
from simulated_device import NotCapturable, SimulatedDevice

GATE, SIGNAL = 0, 1
DEADLINE_S = 20.0


@pytest.fixture
def device():
    return SimulatedDevice()


@pytest.fixture
def flags(device):
    return Flags(device, gates=1, signals=1)


@pytest.fixture
def ping_pong(device, flags):
    """Signals, then waits; twice a replay."""

    def run():
        for _ in range(2):
            device.signal(flags, SIGNAL)
            device.await_(flags, GATE)

    return capture(device, flags, run)


def test_each_signal_is_taken_once_and_none_is_lost_when_the_host_is_late(device, flags):
    for _ in range(3):
        device.signal(flags, SIGNAL)
    signals = flags.host.signals[0]
    assert [signals.take() for _ in range(5)] == [True, True, True, False, False]


def test_flags_lie_apart(flags):
    assert flags.words.stride(0) * 8 == FLAG_STRIDE_BYTES


def test_a_replay_waits_again_although_the_last_one_left_its_flag_up(device, flags, ping_pong):
    gate, signals = flags.host.gates[0], flags.host.signals[0]
    for replay in range(3):
        ping_pong.launch()
        for wait in range(2):
            device.run_some(10)
            assert signals.take() and not signals.take()
            assert not ping_pong.done(), (replay, wait)
            gate.open()
        device.run_some(10)
        assert ping_pong.done()
    assert int(flags.counters[GATE]) == 6


def test_warming_up_neither_hangs_nor_counts(device, flags, ping_pong):
    assert flags.counters.tolist() == [0, 0]
    assert not flags.words.any()
    assert not flags.host.signals[0].take()


def test_poison_releases_every_wait_and_comes_back_in_place_of_signals(device, flags, ping_pong):
    ping_pong.launch()
    device.run_some(10)
    assert flags.host.signals[0].take()
    flags.host.poison()
    device.run_some(10)
    assert ping_pong.done()
    with pytest.raises(Poisoned):
        flags.host.signals[0].take()


def test_opening_a_poisoned_gate_leaves_it_poisoned(device, flags, ping_pong):
    """A count written over poison would hold the next wait for ever."""
    ping_pong.launch()
    device.run_some(10)
    flags.host.poison()
    flags.host.gates[0].open()
    assert int(flags.words[GATE, 0]) == POISON
    device.run_some(10)
    assert ping_pong.done()


def test_poison_wins_over_an_opening_that_it_meets_half_way(flags):
    class Meets:
        """Words in which another thread poisons the gate the moment before the opening's store."""

        def __init__(self, words):
            self.words = words
            self.met = False

        def __setitem__(self, at, value):
            if not self.met:
                self.met = True
                gate.poison()
            self.words[at] = value

    gate = flags.host.gates[0]
    words = gate._words
    gate._words = Meets(words)
    gate.open()
    assert words[0] == POISON


def test_rearmed_flags_work_as_new_ones(device, flags, ping_pong):
    ping_pong.launch()
    flags.host.poison()
    device.run_some(10)
    flags.rearm()
    ping_pong.launch()
    device.run_some(10)
    assert flags.host.signals[0].take()
    assert not ping_pong.done()
    flags.host.gates[0].open()
    flags.host.gates[0].open()
    device.run_some(10)
    assert ping_pong.done() and not int(flags.status)


def test_memory_of_another_size_is_refused():
    with pytest.raises(ValueError, match="3 flags of 16 words, got 32"):
        FlagBlock(memoryview(bytearray(2 * FLAG_STRIDE_BYTES)), 2, 1)


def test_what_was_captured_reads_no_python_again(device):
    factor = [2.0]
    x, y = torch.ones(3), torch.zeros(3)
    graph = device.capture(lambda: y.copy_(x * factor[0]))
    factor[0] = 5.0
    x.fill_(7.0)
    graph.launch()
    device.synchronize()
    assert y.tolist() == [14.0, 14.0, 14.0]


def test_reading_a_value_back_is_refused_during_a_capture(device):
    with pytest.raises(NotCapturable):
        device.capture(lambda: torch.ones(1).item())


class TestWatchdog:
    def test_it_releases_a_wait_nobody_else_would(self, device, flags, ping_pong):
        ping_pong.launch()
        started = time.monotonic()
        with device.running(), Watchdog() as watchdog, watchdog.guard(0.1, flags.host.poison):
            while not ping_pong.done():
                assert time.monotonic() < started + DEADLINE_S
                time.sleep(0.001)
        assert time.monotonic() - started >= 0.1
        with pytest.raises(Poisoned):
            for _ in range(4):
                flags.host.signals[0].take()

    def test_a_block_that_ends_in_time_is_left_alone(self):
        fired = threading.Event()
        with Watchdog() as watchdog:
            for _ in range(3):
                with watchdog.guard(0.02, fired.set):
                    pass
            assert not fired.wait(0.1)

    def test_a_nearer_deadline_than_the_one_it_sleeps_for_is_kept(self):
        fired = threading.Event()
        with Watchdog() as watchdog:
            with watchdog.guard(60.0, lambda: None):
                time.sleep(0.02)
            started = time.monotonic()
            with watchdog.guard(0.05, fired.set):
                assert fired.wait(DEADLINE_S)
            assert time.monotonic() - started < 10.0

    def test_it_fires_once(self):
        calls = []
        with Watchdog() as watchdog, watchdog.guard(0.01, lambda: calls.append(1)):
            time.sleep(0.1)
        assert calls == [1]


@pytest.mark.parametrize(
    "size, dtype", [((3, 5), torch.bfloat16), ((0,), torch.int64), ((4097,), torch.uint8)], ids=str
)
def test_host_memory_starts_on_a_page(device, size, dtype):
    tensor = device.host_tensor(*size, dtype=dtype)
    assert tensor.shape == size and tensor.dtype is dtype
    assert tensor.data_ptr() % 4096 == 0 or not tensor.numel()
