"""`flumectl doctor`, and what `up --device cuda` says."""

import json

import pytest
from click.testing import CliRunner
from flume_common.gpu import round_trip
from flume_common.gpu.round_trip import RoundTrip, Ucx
from flume_controller.flumectl import main

UCX = Ucx("1.21.0", ["tcp/lo", "posix/memory"], [RoundTrip("shared memory", 8192, 30.0, 60.0)])


@pytest.fixture
def run(monkeypatch):
    import flume_controller.flumectl.doctor as doctor

    monkeypatch.setattr(round_trip, "look", lambda: UCX)
    monkeypatch.setattr(doctor.nvml, "look", no_driver)
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
        "  weight and attention nodes cannot run on a GPU yet: use --device cpu",
    ]
