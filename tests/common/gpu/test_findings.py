"""What facts mean, over machines that are made up."""

from dataclasses import replace
from pathlib import Path

import pytest
from flume_common.gpu.findings import Facts, Status, findings, hop, obstacles
from flume_common.gpu.limits import Limits
from flume_common.gpu.mps import Mps
from flume_common.gpu.nvml import Driver, Gpu
from flume_common.gpu.round_trip import RoundTrip, Ucx

H200 = Gpu(0, "NVIDIA H200", "GPU-1", 150 << 30, 0, "9.0", False)
TRIPS = [RoundTrip("shared memory", 8192, 30.0, 60.0), RoundTrip("TCP", 8192, 80.0, 120.0)]
HOST_UCX = Ucx("1.21.0", ["tcp/lo", "posix/memory"], TRIPS)
CPU = Facts("no NVIDIA driver", Mps(False, False, Path("/x")), Limits(None, 8 << 30, 8 << 30), HOST_UCX)
GPU = replace(CPU, driver=Driver("570", "12.8", (H200,)), mps=Mps(True, True, Path("/x")))


def checks(facts, **options):
    return {finding.check: finding for finding in findings(facts, **options)}


def failed(facts, **options):
    return [check for check, finding in checks(facts, **options).items() if finding.status is Status.FAILED]


def test_a_machine_without_a_gpu_is_fine_for_nodes_on_cpus_and_not_for_others():
    assert failed(CPU) == []
    assert failed(CPU, for_gpus=True) == ["nodes on gpus"]
    assert checks(CPU)["gpu"].found == "no NVIDIA driver"


def test_a_torch_without_cuda_is_refused_by_its_version():
    assert obstacles(replace(GPU, torch="2.13.0+cu128")) == []
    (why,) = obstacles(replace(GPU, torch="2.13.0+cpu"))
    assert why.startswith("torch 2.13.0+cpu is built without CUDA")
    assert len(obstacles(replace(CPU, torch="2.13.0+cpu"))) == 2


def test_one_card_with_mps_is_enough():
    assert obstacles(GPU) == []
    assert failed(GPU, for_gpus=True) == []


def test_one_card_without_mps_is_refused_with_what_it_costs_unless_that_is_allowed():
    alone = replace(GPU, mps=Mps(True, False, Path("/x")))
    (why,) = obstacles(alone)
    assert "4.4 ms" in why and "nvidia-cuda-mps-control -d" in why and "--allow-time-slicing" in why
    assert obstacles(alone, allow_time_slicing=True) == []
    assert checks(alone)["mps"].status is Status.WARNING


def test_a_second_card_helps_nothing_as_a_local_cluster_uses_one():
    two = Driver("570", "12.8", (H200, replace(H200, index=1)))
    assert len(obstacles(replace(GPU, driver=two, mps=Mps(False, False, Path("/x"))))) == 1
    assert obstacles(replace(GPU, driver=two)) == []


def test_what_ucx_could_do_with_device_memory_is_said_where_there_is_a_card():
    assert "gpudirect" not in checks(CPU)
    assert checks(GPU)["gpudirect"].found.startswith("UCX here moves no device memory")
    able = replace(GPU, ucx=Ucx("1.21.0", ["tcp/lo", "gdr_copy/cuda", "cuda_ipc/cuda"], TRIPS))
    assert checks(able)["gpudirect"].found.startswith("UCX moves device memory by cuda_ipc, gdr_copy;")


def test_an_old_card_is_refused_by_name():
    old = Driver("570", "12.8", (replace(H200, name="Tesla V100", compute_capability="7.0"),))
    (why,) = obstacles(replace(GPU, driver=old))
    assert why.startswith("Tesla V100 has compute capability 7.0")


def test_a_driver_without_a_card_is_no_gpu():
    (why,) = obstacles(replace(GPU, driver=Driver("570", "12.8", ())))
    assert why == "no GPU can be used: the driver knows of none"


def test_mps_is_said_to_share_a_fate():
    assert "takes the others on its card down" in checks(GPU)["isolation"].found
    assert "isolation" not in checks(CPU)


def test_the_hop_on_a_host_is_shared_memory_with_its_measured_round_trip():
    found = hop(CPU)
    assert found.name == "shared memory" and found.measured == (TRIPS[0],)


@pytest.mark.parametrize("ucx", [
    Ucx("1", ["tcp/lo"], TRIPS),
    Ucx("1", ["tcp/lo", "posix/memory"], TRIPS[1:], {"shared memory": "TimeoutError"}),
], ids=["no such transport", "it does not work"])  # fmt: skip
def test_without_shared_memory_the_hop_is_tcp(ucx):
    assert hop(replace(CPU, ucx=ucx)).name == "TCP"


def test_nodes_that_cannot_reach_each_other_are_a_failure():
    assert failed(replace(CPU, ucx=Ucx("1", [], [], {"TCP": "refused"}))) == ["hop"]
    assert failed(replace(CPU, ucx="no UCX here")) == ["ucx"]


def test_little_shared_memory_is_a_warning_with_a_remedy():
    finding = checks(replace(CPU, limits=Limits(None, 64 << 20, 64 << 20)))["shared memory"]
    assert finding.status is Status.WARNING and "--shm-size" in finding.remedy


@pytest.mark.parametrize("resources, status", [
    (["tcp/lo"], Status.OK), (["rc_mlx5/mlx5_0:1"], Status.WARNING),
], ids=str)  # fmt: skip
def test_a_limit_on_locked_memory_matters_where_a_network_card_registers_it(resources, status):
    limited = replace(CPU, limits=Limits(8192, 8 << 30, 8 << 30), ucx=Ucx("1", resources, TRIPS))
    assert checks(limited)["locked memory"].status is status


def test_where_devices_meet_in_memory_the_hop_is_direct_with_its_measured_round_trip():
    trips = (RoundTrip("device memory", 8192, 7.5, 9.0),)
    met = replace(GPU, direct=trips)
    assert (hop(met).name, hop(met).measured) == ("direct", trips)
    assert checks(met)["device memory round trip"].found == "8 KiB 7.5 us (p99 9)"
    assert checks(met)["hop"].found.startswith("direct: ")


def test_where_they_do_not_the_reason_is_said_and_the_hop_is_another():
    apart = replace(GPU, direct="MappingFailed: no")
    assert hop(apart).name == "shared memory"
    assert checks(apart)["device memory round trip"].status is Status.WARNING
    assert checks(apart)["device memory round trip"].found == "MappingFailed: no"
