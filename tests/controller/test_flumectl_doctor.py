"""`flumectl doctor`, and what `up --device cuda` says."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from flume_common.etcd_binary import free_port
from flume_common.gpu import round_trip
from flume_common.gpu.mps import Mps
from flume_common.gpu.nvml import Driver, Gpu
from flume_common.gpu.round_trip import RoundTrip, Ucx
from flume_controller.flumectl import main

UCX = Ucx("1.21.0", ["tcp/lo", "posix/memory"], [RoundTrip("shared memory", 8192, 30.0, 60.0)])


@pytest.fixture
def run(monkeypatch):
    import flume_controller.flumectl.doctor as doctor

    monkeypatch.setattr(round_trip, "look", lambda: UCX)
    monkeypatch.setattr(doctor.nvml, "look", no_driver)
    monkeypatch.setattr(doctor.metadata, "version", lambda package: "2.13.0+cpu")
    return lambda *words: CliRunner().invoke(main, list(words), prog_name="flumectl")


def no_driver():
    from flume_common.gpu.nvml import NvmlUnavailable

    raise NvmlUnavailable("no NVIDIA driver: not here")


def test_the_table_shows_each_check_with_what_was_found(run):
    result = run("doctor")
    assert result.exit_code == 0, result.output
    lines = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert lines["CHECK"].split() == ["CHECK", "STATUS", "FOUND", "REMEDY"]
    assert "no NVIDIA driver: not here" in lines["gpu"]
    assert "8 KiB 30 us (p99 60)" in lines["shared memory round trip"]
    assert "shared memory: both nodes are on this host" in lines["hop"]


def test_json_has_every_check(run):
    rows = json.loads(run("doctor", "-o", "json").stdout)
    assert {"gpu", "mps", "ucx", "locked memory", "shared memory", "hop"} <= {row["check"] for row in rows}
    assert {"check", "status", "found", "remedy"} == set(rows[0])


def test_what_keeps_nodes_off_gpus_fails_only_where_gpus_are_wanted(run):
    assert run("doctor", "--device", "cuda").exit_code == 1


def test_a_ucx_that_cannot_be_loaded_fails(run, monkeypatch):
    def broken():
        raise round_trip.UcxUnavailable("no UCX here")

    monkeypatch.setattr(round_trip, "look", broken)
    result = run("doctor")
    assert result.exit_code == 1
    assert "no UCX here" in result.stdout


def test_up_on_gpus_is_refused_with_every_reason(run):
    result = run("up", "--device", "cuda")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "Error: a cluster cannot run on GPUs here:",
        "  no GPU can be used: no NVIDIA driver: not here",
        "  torch 2.13.0+cpu is built without CUDA: install a build with it",
    ]


class TestWithAGpu:
    CARD = Gpu(0, "NVIDIA H200", "GPU-1", 140 << 30, 10 << 30, "9.0", False)

    @pytest.fixture
    def up(self, run, monkeypatch, tmp_path):
        import flume_controller.flumectl.doctor as doctor

        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(doctor.nvml, "look", lambda: Driver("570", "12.8", (self.CARD,)))
        monkeypatch.setattr(doctor.mps, "look", lambda: Mps(True, True, Path("/x")))
        monkeypatch.setattr(doctor.metadata, "version", lambda package: "2.13.0+cu128")
        ports = [f"--{name}-port={free_port()}" for name in ("http", "admin", "etcd")]
        common = ["--device", "cuda", "--dry-run", "--data-dir", str(tmp_path), *ports]
        return lambda *words: run("up", *common, *words)

    def test_each_attention_node_gets_its_share_of_what_the_model_leaves(self, up):
        result = up("--attention", "3", "--standby", "1")
        assert result.exit_code == 0, result.output
        (share,) = re.findall(r"NVIDIA H200: (\d+) MiB of KV for each attention node", result.output)
        assert 20_000 < int(share) < 24_000  # of 123 GiB, for four nodes and one more

    def test_a_share_that_is_said_is_left_alone(self, up):
        assert "MiB of KV" not in up("--kv-memory", "1GiB").output

    def test_without_mps_it_is_refused_unless_time_slices_are_allowed(self, up, monkeypatch):
        import flume_controller.flumectl.doctor as doctor

        monkeypatch.setattr(doctor.mps, "look", lambda: Mps(True, False, Path("/x")))
        assert "--allow-time-slicing" in up().stderr
        assert up("--allow-time-slicing").exit_code == 0

    def test_a_card_that_is_full_is_refused_with_the_numbers(self, up, monkeypatch):
        import flume_controller.flumectl.doctor as doctor

        full = replace(self.CARD, memory_used_bytes=139 << 30)
        monkeypatch.setattr(doctor.nvml, "look", lambda: Driver("570", "12.8", (full,)))
        result = up()
        assert result.exit_code == 1
        assert "1024 MiB of the GPU are free: no room for 1 weight nodes" in result.stderr
