import os
import socket
import stat
import tempfile

import pytest
from flume_common.store import StoreConfig
from flume_common.unix_socket import MAX_PATH_BYTES, NotPrivate, make_private, socket_directory

NAME = "etcd.sock:0"


def test_a_socket_that_fits_is_where_it_belongs(tmp_path):
    assert socket_directory(tmp_path, NAME) == tmp_path.resolve()


def test_one_that_does_not_fit_has_a_directory_of_its_own_that_is_always_the_same(tmp_path):
    deep = tmp_path / ("x" * 100)
    instead = socket_directory(deep, NAME)
    assert instead == socket_directory(deep, NAME) != socket_directory(deep / "y", NAME)
    assert str(instead).startswith(tempfile.gettempdir())
    make_private(instead)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(instead / NAME))
        assert len(os.fsencode(instead / NAME)) <= MAX_PATH_BYTES
    finally:
        (instead / NAME).unlink()
        instead.rmdir()


def test_a_directory_is_made_ours_alone(tmp_path):
    open_to_all = tmp_path / "open"
    open_to_all.mkdir(mode=0o755)
    make_private(open_to_all)
    make_private(tmp_path / "new" / "deeper")
    for path in (open_to_all, tmp_path / "new" / "deeper"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_directory_of_somebody_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(NotPrivate, match=r"belongs to user \d+, not to us"):
        make_private(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises((NotPrivate, FileExistsError)):
        make_private(tmp_path / "link")


def test_an_endpoint_may_be_a_socket():
    assert StoreConfig.parse("unix:///run/etcd.sock:0").addresses == ("unix:/run/etcd.sock:0",)
    assert not StoreConfig.parse("unix:///run/etcd.sock:0").tls
    with pytest.raises(ValueError, match="is not host:port"):
        StoreConfig.parse("unix://relative")
