"""What `flumectl up` refuses before it starts anything, with --dry-run as without."""

import os
import socket

import pytest
from flume_common.etcd_binary import free_port
from flume_controller import preflight
from flume_controller.cluster_config import ClusterConfig
from flume_controller.disk_space import DiskSpace
from flume_controller.preflight import ClusterError, check


@pytest.fixture
def config(tmp_path):
    def make(**settings):
        ports = {name: free_port() for name in ("http_port", "admin_port", "etcd_port")}
        return ClusterConfig(data_dir=tmp_path, **(ports | settings))

    return make


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"kv_memory": "-5"}, r"--kv-memory '-5': give a size like 512MiB"),
        ({"kv_memory": "99TiB"}, r"--kv-memory '99TiB' is \d+ bytes, there are \d+"),
        ({"attention": 1_000_000}, r"--attention must be 0 to 64, got 1000000"),
        ({"weights": 100_000}, r"--weight must be 1 to 64, got 100000"),
        ({"standby": 65}, r"--standby must be 0 to 64, got 65"),
        ({"host": "300.1.1.1"}, r"--host 300.1.1.1: cannot listen on '300.1.1.1': .*give an address of this"),
        ({"host": "203.0.113.9"}, r"--host 203.0.113.9: cannot listen on .*: Cannot assign requested"),
        ({"node_host": "203.0.113.9"}, r"--node-host 203.0.113.9: cannot listen"),
        ({"node_host": "no such name"}, r"--node-host no such name: cannot listen"),
        ({"kv_memory": "60%", "model": "/nowhere"}, r"model '/nowhere': no such file"),
    ],
    ids=lambda value: " ".join(map(str, next(iter(value.items())))) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_by_its_flag(config, settings, said, tmp_path):
    with pytest.raises(Exception, match=said):
        check(config(**settings))
    assert list(tmp_path.iterdir()) == []


def test_more_memory_than_the_machine_has_is_refused_with_the_numbers(config, monkeypatch):
    monkeypatch.setattr(
        preflight.host_memory, "measure", lambda: preflight.host_memory.Memory(1 << 30, 1 << 29)
    )
    assert check(config(kv_memory="512MiB", attention=2)).survivors == []
    with pytest.raises(ClusterError, match=r"for 3 attention nodes .* is 1536 MiB, the machine has 1024"):
        check(config(kv_memory="512MiB", attention=2, standby=1))
    with pytest.raises(ClusterError, match=r"--weight 30: .* need at least \d+ MiB, the machine has 1024"):
        check(config(weights=30))


def test_a_port_in_use_is_not_an_address_that_is_not_ours(config):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(preflight.PortsInUse, match=f"port {port} is in use: choose another with --http"):
            check(config(http_port=port))


def test_a_directory_that_cannot_be_used_is_refused_by_its_flag(config, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    refused = config()
    with pytest.raises(ClusterError, match=r"--data-dir .* is not a directory we may write to"):
        check(ClusterConfig(**{**settings_of(refused), "data_dir": tmp_path / "file"}))
    monkeypatch.setattr(preflight, "disk_space", lambda _: DiskSpace(1000, 10))
    with pytest.raises(ClusterError, match="no space left on its disk; free some"):
        check(refused)


def test_what_is_wrong_in_itself_is_said_though_it_runs_already(config, monkeypatch):
    from flume_controller.cluster_files import ClusterRecord, ClusterState
    from flume_controller.processes import record_of

    made = config()
    us = record_of(os.getpid(), id="up", role="up")
    made.files.write(
        ClusterRecord(
            name=made.name, state=ClusterState.READY, supervisor=us, admin_address="a:1", http_url="http://b",
            etcd_endpoints="c:2", model_name="m", ports={},
        )
    )  # fmt: skip
    with pytest.raises(preflight.AlreadyRunning, match="is already running at http://b"):
        check(made)
    with pytest.raises(ClusterError, match="--attention must be"):
        check(config(attention=1000))


def settings_of(config):
    return {name: getattr(config, name) for name in config.__struct_fields__}


def test_a_disk_without_a_fixed_number_of_files_is_not_full(tmp_path):
    from flume_controller.disk_space import disk_space

    assert not disk_space(tmp_path).full
    assert DiskSpace(1 << 40, 0).full and DiskSpace(1000, 5).full
    assert os.statvfs(tmp_path).f_bavail
