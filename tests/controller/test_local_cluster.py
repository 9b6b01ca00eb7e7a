"""`flumectl up` and `down` as users type them, with real etcd and controller and fake nodes."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from flume_common.etcd_binary import free_port
from flume_controller import processes
from flume_controller.cluster_files import ClusterFiles
from flume_controller.foreground import decode, encode
from flume_controller.local_cluster import ClusterConfig
from local_rig import Local, until


@pytest.fixture
def local(tmp_path):
    made = Local(tmp_path)
    yield made
    made.close()


def test_up_runs_everything_and_down_leaves_nothing(local):
    done = local.flumectl("up", "--detach", "--weight", "2", "--attention", "2", "--model-name", "mine")
    assert done.returncode == 0, done.stderr
    for node in ("etcd", "controller-1", "weight-1", "weight-2", "router-1", "attention-1", "attention-2"):
        assert f"  {node} " in done.stdout
    assert f"http://127.0.0.1:{local.ports['--http-port']}/v1" in done.stdout
    assert '"model": "mine"' in done.stdout and "`flumectl down` stops it" in done.stdout
    assert {id: row["state"] for id, row in local.nodes().items()} == dict.fromkeys(
        ["weight-1", "weight-2", "attention-1", "attention-2", "router-1", "controller-1"], "READY"
    )
    done = local.flumectl("down")
    assert (done.returncode, done.stdout) == (0, "cluster 'default' stopped\n")
    assert local.running() == []
    assert local.files.read() is None and local.files.etcd.exists(), "what it knows is kept"
    done = local.flumectl("down")
    assert (done.returncode, done.stdout) == (0, "cluster 'default' is not running\n")


def test_nodes_listen_where_others_reach_them(local):
    local.up("--node-host", "127.0.0.2")
    addresses = {id: row["address"].rpartition(":")[0] for id, row in local.nodes().items()}
    assert addresses.pop("controller-1") == "127.0.0.1"
    assert addresses == dict.fromkeys(["weight-1", "attention-1", "router-1"], "127.0.0.2")


def test_up_in_the_foreground_stops_on_ctrl_c(local):
    child = local.start("up")
    lines = iter(child.stdout.readline, "")
    assert any("`flumectl down` stops it" in line for line in lines)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 0 and "stopping" in err and out.endswith("stopped\n")
    assert local.running() == []


def test_ctrl_c_while_starting_stops_what_had_started(local):
    (local.modules / "flume_router" / "__main__.py").write_text("import time; time.sleep(60)")
    child = local.start("up")
    until(lambda: local.files.records.load("controller-1"))
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=30)
    assert local.running() == []


def test_a_second_up_says_what_runs_and_touches_nothing(local):
    local.up()
    before = local.nodes()
    done = local.flumectl("up")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: cluster 'default' is already running at http://127.0.0.1:")
    assert "`flumectl down` stops it" in done.stderr and len(done.stderr.splitlines()) == 1
    done = local.flumectl("up", "--name", "two")
    assert done.returncode == 1 and done.stdout == ""
    for flag, port in local.ports.items():
        assert f"port {port} is in use by cluster 'default': `flumectl down` stops it" in done.stderr
        assert f"choose another with {flag}" in done.stderr
    after = local.nodes()
    assert {id: row["pid"] for id, row in after.items()} == {id: row["pid"] for id, row in before.items()}


def test_a_port_of_somebody_else_is_named_with_its_flag_before_anything_starts(local):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = local.flumectl("up", **{"--admin-port": port})
    assert (done.returncode, done.stdout) == (1, "")
    assert f"Error: port {port} is in use: choose another with --admin-port" in done.stderr
    assert not local.files.directory.exists()


def test_two_clusters_run_side_by_side(local):
    local.up()
    other = {flag: free_port() for flag in local.ports}
    done = local.flumectl("up", "--detach", "--name", "two", **other)
    assert done.returncode == 0, done.stderr
    try:
        assert "flumectl down --name two" in done.stdout
        assert json.loads(local.flumectl("status", "--name", "two", "-o", "json").stdout)["cluster"] == "two"
    finally:
        assert local.flumectl("down", "--name", "two").returncode == 0
    assert len(local.nodes()) == 4


def test_an_etcd_that_is_given_is_used_and_left_alone(local, etcd_endpoint, keys):
    done = local.flumectl("up", "--detach", "--etcd", etcd_endpoint, "--name", keys.cluster)
    assert done.returncode == 0, done.stderr
    files = ClusterFiles(local.data_dir, keys.cluster)
    assert files.records.load("etcd") is None
    again = local.flumectl(
        "up", "--etcd", etcd_endpoint, "--name", keys.cluster, "--data-dir", str(local.state)
    )
    assert again.returncode == 1
    assert local.flumectl("down", "--name", keys.cluster).returncode == 0


def test_a_node_that_refuses_to_start_is_quoted_and_all_is_cleaned_up(local):
    (local.state / "refuse-weight").write_text("Error: --dtype float32: not today")
    done = local.flumectl("up", "--dtype", "float32")
    assert done.returncode == 1
    assert "Error: weight-1 exited with 1 while starting; its last lines:" in done.stderr
    assert "weight-1| Error: --dtype float32: not today" in done.stderr
    assert local.running() == [] and local.files.read() is None


@pytest.mark.parametrize("detach", [[], ["--detach"]], ids=["foreground", "detached"])
def test_attention_nodes_that_crash_at_start_end_it_with_their_own_words(local, detach):
    (local.state / "crash").touch()
    done = local.flumectl("up", *detach)
    assert done.returncode == 1
    assert "Error: while starting, attention-1 exited with 1" in done.stderr
    assert "attention-1| fake: told to crash" in done.stderr
    assert local.running() == []


def test_a_model_that_is_not_there_is_told_before_anything_starts(local):
    done = local.flumectl("up", "--model", "/no/such/model")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: model '/no/such/model': no such file or directory")
    assert len(done.stderr.splitlines()) == 1 and not local.files.directory.exists()


def test_what_is_not_ready_in_time_is_named(local):
    (local.modules / "flume_router" / "__main__.py").write_text(
        "print('still thinking', flush=True); import time; time.sleep(60)"
    )
    done = local.flumectl("up", "--timeout", "4s")
    assert done.returncode == 1
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("Error: not ready after 4 s: "))
    assert said.endswith("router-1 (--timeout waits longer)")  # on a busy machine others may be late, too
    assert "router-1| still thinking" in done.stderr
    assert local.running() == []


@pytest.mark.parametrize("node", ["weight-1", "router-1", "controller-1", "etcd"])
def test_a_process_that_dies_is_started_again(local, node):
    local.up()
    before = local.files.records.load(node)
    os.kill(before.pid, signal.SIGKILL)

    def is_back():
        after = local.files.records.load(node)
        return after is not None and after.pid != before.pid and processes.is_alive(after)

    until(is_back)
    until(
        lambda: (
            local.flumectl("get", "nodes").returncode == 0
            and all(row["state"] == "READY" for row in local.nodes().values())
            and len(local.nodes()) == 4
        )
    )
    out = (local.files.directory / "up.out").read_text()
    assert f"{node} exited with -9, starting it again in" in out


def test_down_cleans_up_after_an_up_that_was_killed(local):
    local.up()
    local.kill_up()
    assert len(local.files.leftovers()) == 5, "they outlive it"
    done = local.flumectl("down")
    assert (
        done.returncode == 0 and "what had been left behind: router-1, weight-1, controller-1" in done.stdout
    )
    assert local.running() == []
    local.up()


def test_down_leaves_a_process_alone_that_only_has_the_same_pid(local):
    bystander = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True
    )
    try:
        record = processes.record_of(bystander.pid, id="weight-1", role="weight")
        local.files.records.save(
            type(record)(
                **{
                    **{name: getattr(record, name) for name in record.__struct_fields__},
                    "start_ticks": record.start_ticks - 100,
                }
            )
        )
        assert local.flumectl("down").returncode == 0
        assert bystander.poll() is None
        assert local.files.records.all() == []
    finally:
        bystander.kill()
        bystander.wait()


def test_what_up_was_asked_for_reaches_the_detached_process_unchanged():
    config = ClusterConfig(
        name="x", data_dir=Path("/tmp/y"), weights=2, kv_memory="25%", weight_args=("--a", "b")
    )
    assert decode(encode(config)) == config


def test_ports_that_are_the_same_are_refused(local):
    done = local.flumectl("up", **{"--admin-port": local.ports["--http-port"]})
    assert done.returncode == 1 and "--http-port and --admin-port are both" in done.stderr
