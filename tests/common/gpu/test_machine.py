"""Looking at a machine: the driver's library, MPS, limits, and a round trip between two real processes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from flume_common.gpu import limits, mps, nvml, round_trip

HERE = Path(__file__).parent
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def library(tmp_path):
    def build(fail_init=0):
        path = tmp_path / "libnvidia-ml.so.1"
        source = str(HERE / "fake_nvml.c")
        command = ["cc", "-shared", "-fPIC", f"-DFAIL_INIT={fail_init}", "-o", str(path), source]
        subprocess.run(command, check=True)
        return str(path)

    return build


@needs_compiler
def test_cards_and_driver_are_read_through_the_c_interface(library):
    driver = nvml.look(library())
    assert (driver.version, driver.cuda) == ("570.86.15", "12.8")
    first, second = driver.gpus
    assert (first.name, second.name, first.uuid) == ("NVIDIA H200", "NVIDIA A100", "GPU-12")
    assert (first.memory_bytes, first.memory_used_bytes) == (150754820096, 8 << 30)
    assert (first.compute_capability, second.compute_capability) == ("9.0", "8.0")
    assert (first.mig, second.mig) == (None, True)


@needs_compiler
def test_a_driver_that_does_not_answer_says_so(library):
    with pytest.raises(nvml.NvmlUnavailable, match="nvmlInit_v2 failed with NVML status 9"):
        nvml.look(library(fail_init=9))


def test_a_machine_without_a_driver_says_so():
    with pytest.raises(
        nvml.NvmlUnavailable, match=r"no NVIDIA driver \(libno-such-thing\.so cannot be loaded"
    ):
        nvml.look("libno-such-thing.so")


def test_a_library_without_a_function_is_named():
    with pytest.raises(nvml.NvmlUnavailable, match="has no nvmlInit_v2"):
        nvml.look("libc.so.6")


class TestMps:
    @pytest.fixture
    def machine(self, tmp_path):
        """(environment, /proc) with a daemon of pid 7 and its program."""
        program = tmp_path / "bin" / mps.DAEMON
        process = tmp_path / "proc" / "7" / "comm"
        pipes = tmp_path / "pipes"
        for path in (program, process, pipes / mps.PID_FILE):
            path.parent.mkdir(parents=True)
        program.touch(0o755)
        process.write_text("nvidia-cuda-mps\n")
        (pipes / mps.PID_FILE).write_text("7\n")
        return {"PATH": str(program.parent), "CUDA_MPS_PIPE_DIRECTORY": str(pipes)}, tmp_path / "proc"

    def test_a_daemon_of_our_pipe_directory_runs(self, machine):
        found = mps.look(*machine)
        assert found.installed and found.running

    def test_a_pid_file_that_a_dead_daemon_left_is_no_daemon(self, machine):
        environment, processes = machine
        shutil.rmtree(processes / "7")
        assert not mps.look(environment, processes).running

    def test_a_pid_that_passed_to_another_program_is_no_daemon(self, machine):
        environment, processes = machine
        (processes / "7" / "comm").write_text("bash\n")
        assert not mps.look(environment, processes).running

    def test_a_daemon_elsewhere_does_not_count(self, machine, tmp_path):
        environment, processes = machine
        found = mps.look(environment | {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}, processes)
        assert found.installed and not found.running

    def test_nothing_of_it_here(self, tmp_path):
        found = mps.look({"PATH": str(tmp_path)}, tmp_path)
        assert (found.installed, found.running, found.pipes) == (False, False, mps.DEFAULT_PIPES)


def test_shared_memory_is_that_of_the_file_system(tmp_path):
    here, found = os.statvfs(tmp_path), limits.look(tmp_path)
    assert found.shared_bytes == here.f_blocks * here.f_frsize
    assert 0 < found.shared_free_bytes <= found.shared_bytes


def test_a_machine_without_shared_memory_has_none_of_it(tmp_path):
    assert limits.look(tmp_path / "none").shared_bytes == 0


def test_two_processes_measure_a_round_trip_over_both_transports():
    found = round_trip.look(sizes_bytes=[4096], rounds=20)
    assert not found.failures
    assert [(trip.transport, trip.size_bytes) for trip in found.round_trips] == [
        ("shared memory", 4096),
        ("TCP", 4096),
    ]
    assert all(0 < trip.p50_us <= trip.p99_us for trip in found.round_trips)
    assert "tcp/lo" in found.resources
    assert int(found.version.split(".")[0]) >= 1


def test_a_transport_that_does_not_exist_fails_by_itself(monkeypatch):
    monkeypatch.setattr(round_trip, "TRANSPORTS", {"RDMA": "rc,self"})
    found = round_trip._measure([4096], rounds=5)
    assert found.failures.keys() == {"RDMA"} and not found.round_trips


def test_a_process_without_ucx_says_what_it_lacks(monkeypatch, tmp_path):
    (tmp_path / "ucxx.py").write_text("raise ImportError('no UCX here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(round_trip.UcxUnavailable, match="no UCX here"):
        round_trip.look(sizes_bytes=[4096], rounds=5)
