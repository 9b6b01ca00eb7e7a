"""The direct hop that `flumectl doctor` measures, between devices that are simulated."""

import threading

import beside
import pytest
import torch
from flume_attention.cuda.direct_round_trip import HOPS, QUERY_AT, _End
from flume_common.direct_region import ANSWERED_AT, ASKED_AT, mark
from flume_common.gpu import round_trip
from simulated_device import SimulatedDevice


@pytest.fixture(autouse=True)
def modules_beside(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", beside.environment()["PYTHONPATH"])


def test_a_step_takes_a_query_there_and_a_partial_back_in_each_hop():
    ours, theirs = SimulatedDevice(), SimulatedDevice()
    memory = torch.zeros(QUERY_AT + 128, dtype=torch.uint8)
    with torch.inference_mode(), ours.running(), theirs.running():
        asks, answers = _End(ours, memory, 64, _End.ask), _End(theirs, memory, 64, _End.answer)
        asks.own.fill_(7)
        for number in (1, 2):
            other = threading.Thread(target=torch.inference_mode()(answers.step), args=[number])
            other.start()
            assert asks.step(number) > 0
            other.join()
            for at in (ASKED_AT, ANSWERED_AT):
                assert int(memory[at : at + 8].view(torch.int64)) == mark(number, HOPS - 1)
    assert bool((memory[QUERY_AT:] == 7).all()) and bool((asks.own == 7).all())


@pytest.mark.soak  # two processes import torch
def test_two_processes_measure_a_round_trip_by_their_devices_alone():
    (trip,) = round_trip.look_direct([4096], rounds=4, module="simulated_round_trip")
    assert (trip.transport, trip.size_bytes) == ("device memory", 4096)
    assert 0 < trip.p50_us <= trip.p99_us


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_processes_on_a_gpu_meet_in_its_memory():
    small, large = round_trip.look_direct([8192, 65536])
    assert 0 < small.p50_us <= small.p99_us and large.p50_us > 0


def test_what_cannot_be_measured_says_why():
    with pytest.raises(round_trip.Unmeasured, match="No module named no_such"):
        round_trip.look_direct([4096], module="no_such")
