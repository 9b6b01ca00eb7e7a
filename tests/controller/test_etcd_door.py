import asyncio
import os
import socket

from flume_common.etcd_binary import free_port
from flume_controller import etcd_door
from flume_controller.etcd_door import uid_of

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"


def line(local, remote, state, uid):
    return f"   7: {local} {remote} {state} 00000000:00000000 00:00000000 00000000 {uid:5}        0 4711 1 0"


def test_the_owner_of_the_other_end_is_found_in_the_table():
    table = [
        HEAD,
        line("0100007F:0948", "00000000:0000", "0A", 5),  # who listens
        line("0100007F:0948", "0100007F:C001", "01", 6),  # our end
        line("0100007F:C001", "0100007F:0948", "01", 1000),
        line("0100007F:C002", "0100007F:0948", "06", 0),  # closed: nobody's
        line("0000000000000000FFFF00000100007F:C003", "0000000000000000FFFF00000100007F:0948", "01", 8),
    ]
    door = ("127.0.0.1", 0x0948)
    assert uid_of(table, ("127.0.0.1", 0xC001), door) == 1000
    assert uid_of(table, ("127.0.0.1", 0xC002), door) is None
    assert uid_of(table, ("127.0.0.1", 0xC003), door) == 8
    assert uid_of(table, ("127.0.0.1", 0xC004), door) is None


def test_the_kernel_knows_whose_connections_are_ours():
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = server.getsockname()
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::ffff:127.0.0.1")):
            with socket.socket(family) as client:
                client.connect((host, where[1]))
                accepted, peer = server.accept()
                with accepted:
                    assert etcd_door._uid_of(peer, where) == os.getuid()


async def echo(reader, writer):
    while data := await reader.read(100):
        writer.write(data)
    writer.close()


async def ask(port, data=b"hello"):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        return await asyncio.wait_for(reader.read(100), 5)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_our_user_is_passed_on_and_others_are_turned_away(tmp_path, monkeypatch):
    port = free_port()
    server = await asyncio.start_unix_server(echo, tmp_path / "etcd")
    async with server, etcd_door.etcd_door(port, tmp_path / "etcd"):
        assert await ask(port) == b"hello"
        for uid in (4711, None):
            monkeypatch.setattr(etcd_door, "uid_of", lambda *_, uid=uid: uid)
            assert await ask(port) == b""


async def test_without_etcd_a_connection_is_closed(tmp_path):
    port = free_port()
    async with etcd_door.etcd_door(port, tmp_path / "nothing"):
        assert await ask(port) == b""
