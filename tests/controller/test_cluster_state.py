"""What a local cluster knows outlives its processes, and its processes outlive their `up`."""

import json
import os
import signal
import stat
import subprocess
import sys

import msgspec
import pytest
from flume_controller import processes
from flume_controller.cluster_files import ClusterFiles
from local_rig import Local, until

NOBODY = 65534


@pytest.fixture
def local(tmp_path):
    made = Local(tmp_path)
    yield made
    made.close()


def names(local, role="attention"):
    return sorted(id for id, row in local.nodes().items() if row["role"] == role)


def setting(local, name):
    rows = json.loads(local.flumectl("config", "get", name, "-o", "json").stdout)
    return {row["name"]: row["value"] for row in rows}


def status(local):
    return json.loads(local.flumectl("status", "-o", "json").stdout)


def known(local):
    """What is to be the same after everything has ended and `up` was called again."""
    now = status(local)
    return {
        "desired": now["attention"]["desired"],
        "set by": now["set_by"],
        "generation": now["generation"],
        "settings": setting(local, "step_timeout_s"),
        "nodes": sorted(local.nodes()),
    }


def all_ready(local, replicas):
    nodes = local.nodes()
    return len(names(local)) == replicas and all(row["state"] == "READY" for row in nodes.values())


def with_something_to_know(local):
    """Scaled, set, and with a gap in the names of its nodes; what is known then."""
    local.up("--model-name", "mine", "--weight", "2")
    assert local.flumectl("scale", "attention", "--replicas", "3").returncode == 0
    assert local.flumectl("config", "set", "step_timeout_s=7").returncode == 0
    until(lambda: all_ready(local, 3))
    os.kill(local.files.records.load("attention-2").pid, signal.SIGKILL)
    until(lambda: "attention-2" not in names(local) and all_ready(local, 3), 40)
    before = known(local)
    assert before["desired"] == 3 and "attention-4" in before["nodes"]
    return before


@pytest.mark.slow
def test_down_and_up_bring_it_back_as_it_was(local):
    before = with_something_to_know(local)
    assert local.flumectl("down").returncode == 0
    assert local.running() == []
    done = local.flumectl("up", "--detach")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("as last time: --model-name mine --weight 2 ")
    assert "3 attention nodes, as before" in done.stdout and '"model": "mine"' in done.stdout
    assert known(local) == before
    assert local.flumectl("logs", "weight-1").returncode == 0
    assert local.flumectl("logs", "etcd", "--previous").stdout, "logs are kept, too"
    assert local.flumectl("logs", "nobody", "--previous").returncode == 1


@pytest.mark.slow
def test_what_is_given_now_goes_before_what_was(local):
    local.up("--model-name", "mine", "--weight", "2")
    local.flumectl("scale", "attention", "--replicas", "2")
    assert local.flumectl("down").returncode == 0
    done = local.flumectl("up", "--detach", "--weight", "1", "--attention", "1")
    assert done.stdout.startswith("as last time: --model-name mine"), done.stdout + done.stderr
    assert (names(local), names(local, "weight")) == (["attention-1"], ["weight-1"])
    assert status(local)["set_by"] == "user"


def kill_and_return(local, before):
    local.kill_everything()
    done = local.flumectl("status")
    assert done.returncode == 1
    assert "all of its processes ended without `flumectl down`; `flumectl up` brings it back" in done.stderr
    local.up()
    assert known(local) == before


def test_everything_killed_at_once_comes_back_as_it_was(local):
    kill_and_return(local, with_something_to_know(local))


@pytest.mark.slow
def test_everything_killed_at_once_comes_back_as_it_was_again_and_again(local):
    before = with_something_to_know(local)
    for _ in range(5):
        kill_and_return(local, before)


@pytest.mark.slow
def test_after_a_reboot_the_pids_are_those_of_others(local):
    """As far as the files can tell: another boot, and our numbers given to other processes."""
    local.up()
    record, nodes = local.files.read(), local.files.records.all()
    local.kill_everything()
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        of_another_boot = {"pid": bystander.pid, "boot_id": "another-boot"}
        replace = msgspec.structs.replace
        local.files.write(replace(record, supervisor=replace(record.supervisor, **of_another_boot)))
        for node in nodes:
            local.files.records.save(replace(node, **of_another_boot))
        local.up()
        assert bystander.poll() is None
        assert local.flumectl("down").returncode == 0
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_cluster_whose_up_was_killed_is_taken_over_as_it_runs(local):
    local.up("--model-name", "mine")
    local.kill_up()
    before = local.pids()
    done = local.flumectl("status")
    assert "Supervised:    by nobody" in done.stdout and "`flumectl up` to take it over" in done.stdout
    assert status(local)["local"]["supervision"] == "unsupervised"
    os.kill(before["router-1"], signal.SIGKILL)
    done = local.flumectl("up", "--detach")
    assert done.returncode == 0, done.stderr
    assert "taking over what runs: attention-1, controller-1, etcd, weight-1" in done.stdout
    after = local.pids()
    assert {id: pid for id, pid in after.items() if before[id] != pid} == {"router-1": after["router-1"]}
    now = status(local)["local"]
    assert (now["supervision"], now["troubles"]) == ("supervised", [])
    # What was taken over is kept running like what was started.
    for id in ("etcd", "weight-1"):
        os.kill(after[id], signal.SIGKILL)
        until(lambda id=id: local.pids().get(id, after[id]) != after[id])
    assert any("etcd ended; it runs again" in trouble for trouble in status(local)["local"]["troubles"])
    until(lambda: local.flumectl("get", "nodes").returncode == 0 and all_ready(local, 1))
    assert local.flumectl("down").returncode == 0
    assert local.running() == []


@pytest.mark.slow
def test_what_runs_is_not_taken_over_with_other_flags(local):
    local.up()
    local.kill_up()
    before = local.pids()
    done = local.flumectl("up", "--detach", "--dtype", "float32", "--weight", "2")
    assert done.returncode == 1
    assert "run on without their `up`, with another --weight, --dtype: leave that out" in done.stderr
    assert local.pids() == before
    done = local.flumectl("up", "--dry-run")
    assert "would be taken over as it runs: attention-1, controller-1, etcd" in done.stdout
    assert local.pids() == before


@pytest.mark.slow
def test_a_takeover_that_fails_leaves_what_runs(local):
    local.up()
    local.kill_up()
    before = local.pids()
    local.files.link.unlink()
    local.files.link.mkdir()  # where it would answer
    assert local.flumectl("up", "--detach").returncode == 1
    assert local.pids() == before
    local.files.link.rmdir()
    local.up()
    assert local.pids() == before


@pytest.mark.slow
def test_members_in_a_given_etcd_that_died_with_the_machine_are_waited_for(local, etcd_endpoint, keys):
    local.files = ClusterFiles(local.data_dir, keys.cluster)
    local.up("--etcd", etcd_endpoint, "--name", keys.cluster)
    local.kill_everything()
    done = local.flumectl("up", "--detach", "--name", keys.cluster)
    assert done.returncode == 0, done.stderr
    assert f"as last time: --etcd {etcd_endpoint}" in done.stdout
    assert "waiting for the leases of" in done.stdout
    assert local.flumectl("down", "--name", keys.cluster).returncode == 0


@pytest.mark.slow
def test_purge_forgets_what_it_was_told_to_forget(local):
    local.up("--model-name", "mine")
    done = local.flumectl("down", "--purge")
    assert done.returncode == 1 and "confirm it with --yes" in done.stderr
    assert local.nodes(), "nothing was stopped"
    removed = f", and {local.files.directory} removed"
    assert removed in local.flumectl("down", "--purge", "--dry-run").stdout
    assert local.nodes(), "nor was anything by that"
    done = local.flumectl("down", "--purge", "--yes")
    assert (done.returncode, done.stdout) == (0, f"cluster 'default' stopped{removed}\n")
    assert not local.files.directory.exists()
    done = local.flumectl("up", "--detach")
    assert "as last time" not in done.stdout and '"model": "smollm2-135m"' in done.stdout


@pytest.mark.slow
def test_data_of_etcd_that_cannot_be_read_is_named_with_what_to_do(local):
    local.up()
    assert local.flumectl("down").returncode == 0
    for path in local.files.etcd.rglob("*.wal"):
        path.write_bytes(os.urandom(4096))
    done = local.flumectl("up", "--detach")
    assert done.returncode == 1
    assert f"its data in {local.files.etcd} cannot be read" in done.stderr
    assert "`flumectl down --purge`" in done.stderr
    assert local.running() == []


def test_what_up_writes_is_its_users_alone(local):
    local.up()
    assert stat.S_IMODE(local.files.directory.stat().st_mode) == 0o700
    open_to_others = [
        path for path in local.files.directory.rglob("*") if stat.S_IMODE(path.lstat().st_mode) & 0o077
    ]
    assert open_to_others == []
    assert local.files.read().etcd_endpoints.startswith("unix:///")


CONNECT = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.settimeout(5)
connection.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
try:
    print(len(connection.recv(100)))
except ConnectionResetError:
    print(0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_only_its_user_gets_through_the_port_of_etcd(local):
    local.up()
    port = str(local.ports["--etcd-port"])

    def answered(**how):
        done = subprocess.run(
            ["/usr/bin/env", "python3", "-c", CONNECT, port], capture_output=True, text=True, cwd="/", **how
        )
        return int(done.stdout or -1)

    assert answered() > 0
    if subprocess.run(["/usr/bin/env", "python3", "-c", ""], user=NOBODY, cwd="/").returncode:
        pytest.skip("there is no Python that others may run")
    assert answered(user=NOBODY, group=NOBODY, extra_groups=[]) == 0


@pytest.mark.slow
def test_the_port_of_etcd_takes_clients_of_both_kinds(local):
    """gRPC's own connect by a socket that is of IPv6, too."""
    import grpc
    from flume_protos.etcd import etcd_pb2, etcd_pb2_grpc

    local.up()
    with grpc.insecure_channel(f"127.0.0.1:{local.ports['--etcd-port']}") as channel:
        stub = etcd_pb2_grpc.KVStub(channel)
        assert stub.Range(etcd_pb2.RangeRequest(key=b"a", range_end=b"z"), timeout=5).header.revision


@pytest.mark.slow
def test_a_directory_with_a_long_path_works_too(local, tmp_path):
    local.data_dir = tmp_path / ("x" * 120)
    local.files = ClusterFiles(local.data_dir, "default")
    local.up()
    assert local.files.sockets != local.files.directory
    assert stat.S_IMODE(local.files.sockets.stat().st_mode) == 0o700
    assert local.flumectl("down", "--purge", "--yes").returncode == 0
    assert not local.files.sockets.exists()


@pytest.mark.slow
def test_who_has_no_cluster_there_is_told_where_they_are(local, tmp_path):
    local.up()
    done = local.flumectl("get", "nodes", "--name", "other")
    assert done.returncode == 1
    assert f"in {local.data_dir} there are running: default" in done.stderr
    assert "--name (FLUME_CLUSTER)" in done.stderr and "--data-dir (FLUME_DATA_DIR)" in done.stderr
    local.flumectl("down")
    assert "there are stopped: default" in local.flumectl("get", "nodes").stderr


def test_a_record_of_a_process_is_kept_on_a_disk_that_is_full(tmp_path, monkeypatch):
    records = processes.RecordDir(tmp_path)
    record = processes.record_of(os.getpid(), id="weight-1", role="weight")
    records.save(record)

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    after = msgspec.structs.replace(record, pid=7, start_ticks=1)
    records.save(after)
    assert records.load("weight-1") == after
    with pytest.raises(OSError, match="No such file"):
        records.save(msgspec.structs.replace(record, id="weight-2"))


def _can_mount(folder):
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150m", "tmpfs", folder], capture_output=True)
    return done.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_a_full_disk_is_told_and_heals_by_itself(local, tmp_path):
    small = tmp_path / "small"
    if not _can_mount(small):
        pytest.skip("this machine lets us mount nothing")
    local.data_dir = small
    local.files = ClusterFiles(small, "default")
    try:
        local.up()
        before = local.pids()
        with (small / "fill").open("wb", buffering=0) as fill, pytest.raises(OSError, match="No space left"):
            while True:
                fill.write(bytes(1 << 16))
        # What needs room ends only when it needs some: etcd, once it has to grow its file.
        value = {"FAKE": "x" * 500_000}
        until(lambda: _etcd_dies(local, before["etcd"], value), 60)
        done = local.flumectl("scale", "attention", "--replicas", "2")
        assert done.returncode == 1 and "free some" in done.stderr, done.stderr
        troubles = " ".join(status(local)["local"]["troubles"])
        assert "is full" in troubles and "it is started again by itself" in troubles
        kept = {id: pid for id, pid in local.pids().items() if id != "etcd"}
        assert kept == {id: pid for id, pid in before.items() if id != "etcd"}, "the others go on"
        (small / "fill").unlink()
        until(lambda: local.pids().get("etcd", before["etcd"]) != before["etcd"], 20)
        until(lambda: local.flumectl("scale", "attention", "--replicas", "2").returncode == 0, 30)
        until(lambda: all_ready(local, 2), 30)
        assert local.flumectl("down").returncode == 0
    finally:
        local.close()
        subprocess.run(["umount", "-l", small], check=True)


def _etcd_dies(local, pid, value):
    """Have it write something large; whether it has ended of that."""
    import grpc
    from flume_protos.etcd import etcd_pb2, etcd_pb2_grpc

    with grpc.insecure_channel(f"unix:{local.files.sockets / 'etcd.sock:0'}") as channel:
        stub = etcd_pb2_grpc.KVStub(channel)
        try:
            for number in range(20):
                put = etcd_pb2.PutRequest(key=f"fill/{number}".encode(), value=value["FAKE"].encode())
                stub.Put(put, timeout=2)
        except grpc.RpcError:
            pass
    return local.pids().get("etcd") != pid
