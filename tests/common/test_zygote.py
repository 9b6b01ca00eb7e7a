"""Zygotes as processes, forking small children."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid

import msgspec
import psutil
import pytest
from flume_common.engine_link import run_engine
from flume_common.zygote import UNKNOWN_EXIT, Fork, ZygoteUnavailable, abstract_name, bind, fork
from flume_common.zygote import client as client_module

CHILD = """
    import json, os, random, signal, sys, time
    import numpy.random

    numpy.random.random()  # seeded before the fork

    os.environ["FLUME_TEST_IMPORTED"] = "1"
    os.environ.setdefault("FLUME_TEST_ASKED", "no")

    def main():
        what, *rest = sys.argv[1:]
        if what == "tell":
            print(json.dumps({
                "argv": sys.argv, "pid": os.getpid(), "group": os.getpgrp(), "env": dict(os.environ),
                "stdin": os.readlink("/proc/self/fd/0"),
                "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
                "numbers": [random.random(), numpy.random.random()], "modules": sorted(sys.modules),
                "cmdline": open("/proc/self/cmdline").read().replace("\\0", " "),
                "files": len(os.listdir("/proc/self/fd")),
            }))
            return int(rest[0]) if rest else None
        if what == "exit":
            sys.exit(rest[0])
        if what == "raise":
            raise RuntimeError("on purpose")
        print("up", flush=True)
        time.sleep(60)
"""
ENGINE = """
    import os, select, sys
    import msgspec
    from flume_common.engine_link import EngineLink, LinkClosed

    class Say(msgspec.Struct, tag=True):
        text: str

    def main():
        link = EngineLink(int(sys.argv[sys.argv.index("--link-fd") + 1]), Say)
        link.send(Say(f"{os.getpid()} {os.getpgrp()} {' '.join(sys.argv)}"))
        while True:
            select.select([link], [], [])
            try:
                for message in link.receive():
                    link.send(message)
            except LinkClosed:
                sys.exit(3)
"""
RUN = """
    import importlib, os, socket, sys
    from flume_common.telemetry import configure_logging
    from flume_common.zygote import server
    server.TIED_GRACE_S = 1.0
    server.DEVICE_FILES = os.environ.get("FLUME_TEST_DEVICES", server.DEVICE_FILES)

    def prepare():
        if name := os.environ.get("FLUME_TEST_PREPARE"):
            importlib.import_module(name)
            print("prepared", file=sys.stderr)

    configure_logging("zygote", "test")
    words = iter(sys.argv[1:])
    listeners = [(socket.socket(fileno=int(fd)), module) for fd, module in zip(words, words)]
    server.run([server.Stage(listener, module, prepare) for listener, module in listeners])
"""


class Say(msgspec.Struct, tag=True):
    text: str


class Running:
    """A zygote with the stages `flume_test_child` and `flume_test_engine`."""

    def __init__(self, folder, *modules):
        self.folder = folder
        self.names = [f"flume-test-{uuid.uuid4().hex}" for _ in modules]
        sockets = [bind(name) for name in self.names]
        words = [word for s, m in zip(sockets, modules, strict=True) for word in (str(s.fileno()), m)]
        path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
        self.log = folder / "zygote.log"
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "flume_test_run.py"), *words],
            pass_fds=[s.fileno() for s in sockets], stderr=self.log.open("wb"), start_new_session=True,
            env=os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        for s in sockets:
            s.close()

    async def fork(self, *args, stage=0, fds=None, timeout_s=15.0, **more):
        request = Fork(module="flume_test_child", args=list(args), env=dict(os.environ), **more)
        with (self.folder / "child.log").open("ab") as file:
            return await fork(self.names[stage], request, fds or (file.fileno(), 2), timeout_s=timeout_s)

    async def told(self, *args, **more):
        """What a child says of itself, and its exit code."""
        (self.folder / "child.log").unlink(missing_ok=True)
        child = await self.fork("tell", *args, **more)
        code = await asyncio.wait_for(child.wait(), 10)
        return json.loads((self.folder / "child.log").read_text()), code

    async def up(self, *args, **more):
        """A child that has begun to sleep."""
        (self.folder / "child.log").unlink(missing_ok=True)
        child = await self.fork("sleep", *args, **more)
        await eventually(lambda: "up" in (self.folder / "child.log").read_text())
        return child

    def children(self):
        return psutil.Process(self.process.pid).children(recursive=True)


async def eventually(look, timeout_s=10.0):
    async with asyncio.timeout(timeout_s):
        while not (got := look()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return got


def is_gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def start(tmp_path):
    """Starts zygotes, and ends all processes they made."""
    for name, text in (("child", CHILD), ("engine", ENGINE), ("run", RUN)):
        (tmp_path / f"flume_test_{name}.py").write_text(textwrap.dedent(text))
    started = []

    def begin(*modules):
        started.append(Running(tmp_path, *(modules or ("flume_test_child",))))
        return started[-1]

    yield begin
    for zygote in started:
        if zygote.process.poll() is None:
            for child in zygote.children():
                child.kill()
            zygote.process.kill()
        zygote.process.wait()


async def test_a_child_is_a_process_of_its_own(start, monkeypatch):
    zygote = start()
    monkeypatch.setenv("FLUME_TEST_ASKED", "yes")
    said, code = await zygote.told("7")
    assert code == 7
    assert said["argv"] == ["flume_test_child", "tell", "7"]
    assert said["group"] == said["pid"] != zygote.process.pid
    assert said["stdin"] == os.devnull and said["sigterm"]
    assert said["cmdline"].startswith(f"{sys.executable} -m flume_test_child tell 7")
    assert said["env"] == dict(os.environ) | {"FLUME_TEST_IMPORTED": "1", "FLUME_TEST_ASKED": "yes"}
    assert said["files"] <= 4, "of the zygote's own it has none: three, and the folder it lists"


@pytest.mark.parametrize(
    "args, code", [(["exit", "5"], 1), (["raise"], 1), (["tell"], 0)], ids=["text", "error", "nothing"]
)
async def test_exit_codes_are_those_of_a_program_run_by_itself(start, args, code):
    assert await asyncio.wait_for((await start().fork(*args)).wait(), 10) == code


async def test_two_children_in_a_row_draw_different_random_numbers(start):
    zygote = start()
    (one, _), (two, _) = await zygote.told(), await zygote.told()
    assert one["numbers"][0] != two["numbers"][0], "random"
    assert one["numbers"][1] != two["numbers"][1], "numpy"


async def test_a_later_stage_has_more_imported_and_an_earlier_one_has_not(start):
    zygote = start("flume_test_child", "flume_test_engine")
    early, _ = await zygote.told(stage=0)
    late, _ = await zygote.told(stage=1)
    assert "flume_test_engine" in late["modules"]
    assert "flume_test_engine" not in early["modules"]


async def test_a_request_made_before_all_is_imported_waits(start, tmp_path):
    (tmp_path / "flume_test_slow.py").write_text(
        "import time\ntime.sleep(0.5)\nfrom flume_test_child import *"
    )
    zygote = start("flume_test_slow")
    began_s = time.monotonic()
    _, code = await zygote.told()
    assert code == 0 and time.monotonic() - began_s >= 0.5


async def test_killed_children_are_reaped_and_reported(start):
    zygote = start()
    child = await zygote.up()
    child.kill()
    assert await asyncio.wait_for(child.wait(), 5) == -signal.SIGKILL
    assert not zygote.children()


async def test_children_outlive_a_killed_zygote(start):
    zygote = start()
    child = await zygote.up()
    zygote.process.kill()
    zygote.process.wait()
    waiting = asyncio.create_task(child.wait())
    await asyncio.sleep(0.2)
    assert not is_gone(child.pid) and not waiting.done()
    child.kill()
    assert await asyncio.wait_for(waiting, 5) == UNKNOWN_EXIT
    with pytest.raises(ZygoteUnavailable):
        await zygote.fork("tell")


async def test_when_one_stage_is_killed_all_end_and_children_do_not(start):
    zygote = start("flume_test_child", "flume_test_engine")
    child = await zygote.up(stage=1)
    stage = psutil.Process(child.pid).parent()
    assert stage.pid != zygote.process.pid
    stage.kill()
    assert await asyncio.to_thread(zygote.process.wait, 5) == 1
    assert not is_gone(child.pid)
    child.kill()

    zygote = start("flume_test_child", "flume_test_engine")
    child = await zygote.up(stage=1)
    stage = psutil.Process(child.pid).parent()
    zygote.process.kill()
    zygote.process.wait()
    await eventually(lambda: is_gone(stage.pid))
    assert not is_gone(child.pid)
    child.kill()


async def test_a_tied_child_ends_some_time_after_whoever_asked_for_it(start):
    zygote = start()
    tied, free = await zygote.up(tied=True), await zygote.up()
    tied.forget()
    free.forget()
    await asyncio.sleep(0.1)
    assert not is_gone(tied.pid)
    await eventually(lambda: is_gone(tied.pid))
    assert not is_gone(free.pid)


async def test_whoever_gave_up_gets_no_child(start):
    """Or there would be two of a node: the one nobody knows of, and the one made instead."""
    zygote = start()
    await zygote.told()
    zygote.process.send_signal(signal.SIGSTOP)
    with pytest.raises(ZygoteUnavailable, match=r"0\.2 s"):
        await zygote.fork("sleep", timeout_s=0.2)
    zygote.process.send_signal(signal.SIGCONT)
    await zygote.told()
    assert not zygote.children()
    assert zygote.log.read_text().count('"forked"') == 2


async def test_a_child_whose_pid_was_never_read_is_killed(start, monkeypatch):
    zygote = start()

    async def lose(fd):
        await eventually(lambda: '"forked"' in zygote.log.read_text())
        raise TimeoutError

    monkeypatch.setattr(client_module, "_readable", lose)
    with pytest.raises(ZygoteUnavailable):
        await zygote.fork("sleep")
    monkeypatch.undo()
    await zygote.told()
    await eventually(lambda: not zygote.children())
    assert '"exit_code": -9' in zygote.log.read_text()


async def test_what_has_threads_is_not_forked(start, tmp_path):
    (tmp_path / "flume_test_threads.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    )
    zygote = start("flume_test_threads")
    with pytest.raises(ZygoteUnavailable):
        await zygote.fork("tell")
    assert zygote.process.wait() == 1 and "zygote_has_threads" in zygote.log.read_text()


async def test_what_has_a_device_open_is_not_forked(start, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUME_TEST_DEVICES", "/dev/full")
    (tmp_path / "flume_test_device.py").write_text("file = open('/dev/full')")
    zygote = start("flume_test_device")
    with pytest.raises(ZygoteUnavailable):
        await zygote.fork("tell")
    assert zygote.process.wait() == 1 and "zygote_has_device" in zygote.log.read_text()


async def test_a_stage_is_prepared_once_and_children_have_what_was_prepared(start, monkeypatch):
    monkeypatch.setenv("FLUME_TEST_PREPARE", "fractions")
    zygote = start()
    (one, _), (two, _) = await zygote.told(), await zygote.told()
    assert "fractions" in one["modules"] and "fractions" in two["modules"]
    assert zygote.log.read_text().count("prepared") == 1


async def test_what_is_no_request_is_refused_and_the_zygote_goes_on(start):
    zygote = start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(f"\0{zygote.names[0]}")
        connection.send(b"\x93what?")
        assert b"Refused" in await asyncio.to_thread(connection.recv, 1000)
    _, code = await zygote.told()
    assert code == 0


async def test_an_engine_is_forked_into_the_group_of_its_supervisor(start):
    zygote = start("flume_test_child", "flume_test_engine")
    async with run_engine("flume_test_engine", ["--more", "1"], inbox=Say, zygote=zygote.names[1]) as engine:
        pid, group, *argv = (await asyncio.wait_for(engine.receive(), 15)).text.split()
        assert int(pid) == engine.pid and psutil.Process(engine.pid).ppid() != os.getpid()
        assert argv[0] == "flume_test_engine" and argv[1] == "--link-fd" and argv[3:] == ["--more", "1"]
        # Ours is in another session than the zygote's and cannot be joined; a node's can.
        assert int(group) == engine.pid
        engine.send(Say("hello"))
        assert await asyncio.wait_for(engine.receive(), 5) == Say("hello")
    assert engine.process.returncode == 3


async def test_without_a_zygote_an_engine_is_run_anew(start, tmp_path, caplog):
    start()  # for its modules
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    source = (tmp_path / "flume_test_engine.py").read_text()
    (tmp_path / "flume_test_engine.py").write_text(source + "\nif __name__ == '__main__':\n    main()\n")
    async with run_engine(
        "flume_test_engine", [], inbox=Say, env={"PYTHONPATH": path}, zygote="flume-test-nobody"
    ) as engine:
        await asyncio.wait_for(engine.receive(), 15)
        assert psutil.Process(engine.pid).ppid() == os.getpid()
    assert engine.process.returncode == 3


def test_the_name_of_a_socket_depends_on_the_folder_alone(tmp_path):
    (tmp_path / "a").mkdir()
    assert abstract_name("x", tmp_path) == abstract_name("x", tmp_path / "a" / "..")
    assert len({abstract_name(k, p) for k in "xy" for p in (tmp_path, tmp_path / "a")}) == 4


def test_a_name_is_taken_once():
    name = f"flume-test-{uuid.uuid4().hex}"
    with bind(name), pytest.raises(OSError):
        bind(name)
    bind(name).close()
