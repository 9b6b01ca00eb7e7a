"""Flags, counters, poison: one end runs the kernels, the other is a thread that stands for the host or a
peer."""

import threading
import time

import pytest
import torch
from flume_kernels.gpu.signals import POISON, await_, land, poison, rearm, signal

HOST_WAIT_S = 20.0


@pytest.fixture
def words(device):
    """flags in memory both ends see; counters and status on the device."""
    flags = torch.zeros(2, 16, dtype=torch.int64)
    flags = flags.pin_memory() if device == "cuda" else flags
    counters = torch.zeros(2, dtype=torch.int64, device=device)
    return (
        flags[0, :1],
        flags[1, :1],
        counters[:1],
        counters[1:],
        torch.zeros(1, dtype=torch.int64, device=device),
    )


def wait_for(flag, value):
    deadline = time.monotonic() + HOST_WAIT_S
    while int(flag) < value:
        assert time.monotonic() < deadline, f"flag stayed at {int(flag)}, waited for {value}"
        time.sleep(1e-4)


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def test_signals_count_up_without_a_literal(words):
    flag, _, counter, _, status = words
    for expected in (1, 2, 3):
        signal(flag, counter, status)
        synchronize()
        assert int(flag) == int(counter) == expected


def test_a_wait_ends_when_the_other_end_has_signalled_and_not_before(words):
    flag, _, counter, _, status = words
    done = threading.Event()

    def device_end():
        for _ in range(3):
            await_(flag, counter, status)
        synchronize()
        done.set()

    thread = threading.Thread(target=device_end)
    thread.start()
    for value in (1, 2):
        flag.fill_(value)
    assert not done.wait(0.2)
    flag.fill_(3)
    thread.join(HOST_WAIT_S)
    assert done.is_set() and int(counter) == 3 and int(status) == 0


def test_a_flag_ahead_of_the_counter_lets_every_due_wait_pass(words):
    flag, _, counter, _, status = words
    flag.fill_(5)
    for _ in range(5):
        await_(flag, counter, status)
    synchronize()
    assert int(counter) == 5 and int(status) == 0


def test_ping_pong_with_a_host_thread_keeps_step(words):
    request, answer, sent, got, status = words
    seen = []

    def host_end():
        for round_ in range(1, 21):
            wait_for(request, round_)
            seen.append(int(request))
            answer.fill_(round_)

    host = threading.Thread(target=host_end)
    host.start()
    for _ in range(20):
        signal(request, sent, status)
        await_(answer, got, status)
    synchronize()
    host.join(HOST_WAIT_S)
    assert seen == list(range(1, 21)) and int(status) == 0


def test_poison_releases_a_wait_and_says_so(words):
    flag, _, counter, _, status = words
    watchdog = threading.Timer(0.1, poison, [flag])
    watchdog.start()
    await_(flag, counter, status)
    synchronize()
    watchdog.join()
    assert int(status) == 1 and int(counter) == 1


def test_after_poison_every_wait_passes_and_every_signal_is_poison(words):
    request, answer, sent, got, status = words
    signal(request, sent, status)
    poison(answer)
    for _ in range(3):
        await_(answer, got, status)
        signal(request, sent, status)
    synchronize()
    assert int(request) == POISON
    assert int(sent) == 4 and int(got) == 3


def test_poison_seen_once_spreads_from_end_to_end(words, device):
    to_peer, from_peer, sent, got, status = words
    peer_got, peer_sent, peer_status = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(3))
    poison(from_peer)
    await_(from_peer, got, status)
    signal(to_peer, sent, status)
    await_(to_peer, peer_got, peer_status)
    signal(from_peer, peer_sent, peer_status)
    synchronize()
    assert int(status) == int(peer_status) == 1


def test_rearmed_words_count_from_one_again(words):
    flag, _, counter, _, status = words
    poison(flag)
    await_(flag, counter, status)
    synchronize()
    rearm(flag, counter, status)
    signal(flag, counter, status)
    synchronize()
    assert int(flag) == 1 and int(status) == 0


@pytest.mark.parametrize("count", [1, 2048, 5000])
def test_landed_data_is_what_was_sent(count, device):
    source = torch.randn(count)
    source = source.pin_memory() if device == "cuda" else source
    target = torch.full((count,), torch.nan, device=device)
    land(source, target)
    synchronize()
    assert torch.equal(target.cpu(), source)


def test_words_of_another_kind_are_refused(words):
    flag, _, counter, _, _ = words
    with pytest.raises(ValueError, match="int64"):
        signal(flag, counter, torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="does not fit"):
        land(flag, torch.zeros(2, dtype=torch.int64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need a GPU")
def test_a_replayed_graph_counts_on_and_waits_each_time(words):
    request, answer, sent, got, status = words
    answer.fill_(1)
    signal(request, sent, status)
    await_(answer, got, status)
    synchronize()
    rearm(request, answer, sent, got, status)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        signal(request, sent, status)
        await_(answer, got, status)
    for round_ in range(1, 101):
        graph.replay()
        wait_for(request, round_)
        assert not torch.cuda.current_stream().query()
        answer.fill_(round_)
        synchronize()
    assert int(got) == 100 and int(status) == 0
