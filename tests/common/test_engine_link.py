"""The link against a real child process."""

import asyncio
import os
import signal
import socket
import textwrap
import threading
import time
from contextlib import asynccontextmanager

import msgspec
import pytest
from flume_common import engine_link
from flume_common.engine_link import EngineLink, LinkClosed, run_engine
from flume_common.tasks import background


class Echo(msgspec.Struct, tag=True):
    number: int
    data: bytes = b""


class Flood(msgspec.Struct, tag=True):
    frames: int
    size: int


class Quit(msgspec.Struct, tag=True):
    pass


Message = Echo | Flood | Quit

CHILD = """
    import os, select, sys
    import msgspec
    from flume_common.engine_link import EngineLink, LinkClosed

    class Echo(msgspec.Struct, tag=True):
        number: int
        data: bytes = b""

    class Flood(msgspec.Struct, tag=True):
        frames: int
        size: int

    class Quit(msgspec.Struct, tag=True):
        pass

    link = EngineLink(int(sys.argv[sys.argv.index("--link-fd") + 1]), Echo | Flood | Quit)
    if "--deaf" in sys.argv:
        import time
        time.sleep(60)
    while True:
        select.select([link], [], [])
        try:
            messages = link.receive()
        except LinkClosed:
            open(os.environ["GOODBYE"], "w").close()
            sys.exit(0)
        for message in messages:
            if isinstance(message, Quit):
                sys.exit(3)
            elif isinstance(message, Flood):
                for number in range(message.frames):
                    link.send(Echo(number, bytes(message.size)))
            else:
                link.send(message)
"""


@pytest.fixture
def engine(tmp_path):
    """Runs the child; its file `goodbye` appears when it has seen the link close."""
    (tmp_path / "flume_test_echo.py").write_text(textwrap.dedent(CHILD))

    def run(*args, stop_s=5.0):
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        env = {"PYTHONPATH": path, "GOODBYE": str(tmp_path / "goodbye")}
        return run_engine("flume_test_echo", args, inbox=Message, env=env, stop_s=stop_s)

    return run


async def test_messages_go_there_and_back_in_order(engine):
    async with engine() as link:
        for number in range(200):
            link.send(Echo(number, b"x" * number))
        got = [await asyncio.wait_for(link.receive(), 10) for _ in range(200)]
    assert got == [Echo(number, b"x" * number) for number in range(200)]


async def test_a_frame_larger_than_every_socket_buffer_arrives_whole(engine):
    data = os.urandom(8 << 20)
    async with engine() as link:
        link.send(Echo(1, data))
        link.send(Echo(2))
        assert await asyncio.wait_for(link.receive(), 20) == Echo(1, data)
        assert await asyncio.wait_for(link.receive(), 20) == Echo(2)


async def test_an_engine_ahead_of_its_supervisor_loses_nothing(engine):
    async with engine() as link:
        link.send(Flood(frames=64, size=1 << 18))
        await asyncio.sleep(0.3)
        numbers = [(await asyncio.wait_for(link.receive(), 20)).number for _ in range(64)]
    assert numbers == list(range(64))


async def test_leaving_the_block_closes_the_link_and_the_engine_ends_by_itself(engine, tmp_path):
    async with engine() as link:
        link.send(Echo(1))
        await link.receive()
    assert link.process.returncode == 0
    assert (tmp_path / "goodbye").exists()


async def test_an_engine_that_does_not_end_is_killed_in_time(engine):
    started_s = time.monotonic()
    async with engine("--deaf", stop_s=0.2) as link:
        pass
    assert link.process.returncode == -signal.SIGKILL
    assert time.monotonic() - started_s < 5


async def test_an_engine_that_gives_no_sign_of_life_is_killed_and_one_that_does_is_not(engine, monkeypatch):
    monkeypatch.setattr(engine_link, "_LOOK_EVERY_S", 0.2)
    async with watched(engine) as link:
        with pytest.raises(TimeoutError):  # signs of life are no messages
            await asyncio.wait_for(link.receive(), 2.0)
        assert link.process.returncode is None
        os.kill(link.pid, signal.SIGSTOP)
        with pytest.raises(LinkClosed):
            await asyncio.wait_for(link.receive(), 10)
    assert link.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("met", [BrokenPipeError, ConnectionResetError])
async def test_an_engine_that_dies_while_it_is_written_to_has_closed_the_link(engine, met):
    async with engine() as link:
        link._reader.set_exception(met())
        with pytest.raises(LinkClosed):
            await link.receive()


async def test_time_in_which_the_supervisor_did_not_run_is_not_held_against_the_engine(engine, monkeypatch):
    monkeypatch.setattr(engine_link, "_LOOK_EVERY_S", 0.2)
    async with watched(engine) as link:
        os.kill(link.pid, signal.SIGSTOP)
        time.sleep(2.0)  # noqa: ASYNC251 # the whole loop: we are stopped as the engine is
        os.kill(link.pid, signal.SIGCONT)
        link.send(Echo(2))
        assert await asyncio.wait_for(link.receive(), 10) == Echo(2)


@asynccontextmanager
async def watched(engine):
    async with engine() as link:
        link.send(Echo(1))
        assert await asyncio.wait_for(link.receive(), 10) == Echo(1)
        async with background(watch=link.watch(lambda: 1.4)):
            yield link


async def test_an_engine_that_ends_is_told_by_receive_after_its_last_words(engine):
    async with engine() as link:
        link.send(Echo(1))
        link.send(Quit())
        assert await asyncio.wait_for(link.receive(), 10) == Echo(1)
        with pytest.raises(LinkClosed, match=str(link.pid)):
            await asyncio.wait_for(link.receive(), 10)
    assert link.process.returncode == 3


async def test_an_engine_that_is_killed_is_told_by_receive_and_soon_by_send(engine):
    async with engine() as link:
        link.send(Echo(1))
        await asyncio.wait_for(link.receive(), 10)
        link.process.kill()
        with pytest.raises(LinkClosed):
            await asyncio.wait_for(link.receive(), 10)
        with pytest.raises(LinkClosed):
            for _ in range(100):
                link.send(Echo(2))
                await asyncio.sleep(0.01)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    link = EngineLink(theirs.detach(), Message)
    yield ours, link
    ours.close()


def frame(message):
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(4, "little") + data


def test_the_engine_never_waits_for_a_message(pair):
    _, link = pair
    assert link.receive() == []


def test_a_message_in_pieces_is_given_when_it_is_whole(pair):
    supervisor, link = pair
    data = frame(Echo(1, b"abc")) + frame(Echo(2))
    got = []
    for at in range(len(data)):
        supervisor.sendall(data[at : at + 1])
        got += link.receive()
        assert len(got) == (at >= len(frame(Echo(1, b"abc"))) - 1) + (at == len(data) - 1)
    assert got == [Echo(1, b"abc"), Echo(2)]


def test_the_last_messages_come_before_the_end(pair):
    supervisor, link = pair
    supervisor.sendall(frame(Echo(1)))
    supervisor.close()
    assert link.receive() == [Echo(1)]
    with pytest.raises(LinkClosed):
        link.receive()
    with pytest.raises(LinkClosed):
        link.send(Echo(2))


def test_sending_into_a_full_socket_waits_for_the_supervisor_and_then_goes_on(pair):
    supervisor, link = pair
    message, received = Echo(1, os.urandom(4 << 20)), bytearray()
    sent = threading.Event()

    def send():
        link.send(message)
        sent.set()

    thread = threading.Thread(target=send)
    thread.start()
    assert not sent.wait(0.1), "4 MiB fit a socket buffer: the test shows nothing"
    while len(received) < len(frame(message)):
        received += supervisor.recv(1 << 20)
    thread.join(5)
    assert sent.is_set()
    assert received == frame(message)
    assert link.receive() == [], "receiving must not wait after a send that did"


def test_a_supervisor_that_dies_during_a_send_ends_it(pair):
    supervisor, link = pair
    threading.Timer(0.1, supervisor.close).start()
    with pytest.raises(LinkClosed):
        link.send(Echo(1, bytes(8 << 20)))
