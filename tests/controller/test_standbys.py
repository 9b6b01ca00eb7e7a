"""The local provider's standbys, with small programs in the place of attention nodes."""

import asyncio
import os
import signal
import sys
import textwrap

import pytest
from flume_common.standby import call
from flume_common.zygote import abstract_name
from flume_controller import processes
from flume_controller.processes import Intent, RecordDir
from flume_controller.providers import standby
from flume_controller.providers.local import local_provider
from flume_controller.supervise import kill_all

NODE = """
    import asyncio, os, sys
    from flume_common.standby import until_called
    print("began", flush=True)
    if "--standby" in sys.argv:
        socket = sys.argv[sys.argv.index("--standby") + 1]
        print("called", asyncio.run(until_called(socket, os.getpid())), flush=True)
    import time
    time.sleep(60)
"""


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setattr(standby, "PAUSE_S", 0.05)
    (tmp_path / "node.py").write_text(textwrap.dedent(NODE))
    yield tmp_path
    kill_all(RecordDir(tmp_path / "run"))


@pytest.fixture
def provider(directory):
    """Providers of that directory with one standby, whose replacement can be switched off."""

    def make(num_standbys=1, command=None):
        command = command or (lambda node: (sys.executable, str(directory / "node.py")))
        return local_provider(command, directory, num_standbys=num_standbys)

    return make


async def until(look, timeout_s=10.0):
    async with asyncio.timeout(timeout_s):
        while not (got := look()):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return got


def record(directory, id="standby-1"):
    return RecordDir(directory / "run").load(id)


def log(directory, id="standby-1"):
    path = directory / "logs" / f"{id}.log"
    return path.read_text() if path.exists() else ""


class Keeping:
    """`keep_ready` while the block runs."""

    def __init__(self, provider):
        self._provider = provider

    async def __aenter__(self):
        self._task = asyncio.create_task(self._provider.keep_ready())

    async def __aexit__(self, *_):
        self._task.cancel()


async def one_standby(local, directory):
    """Started, and no others after it."""
    async with Keeping(local):
        await until(lambda: "began" in log(directory))
    await asyncio.sleep(0.3)  # until it listens
    return record(directory)


async def test_a_standby_becomes_the_node_and_is_counted_only_then(directory, provider):
    async with provider() as local:
        waiting = await one_standby(local, directory)
        assert await local.instances() == []
        await local.start("attention-1")
        (node,) = await local.instances()
        assert (node.id, node.pid) == ("attention-1", waiting.pid)
        assert node.started_at_s > waiting.started_at_s, "or its start would soon have taken too long"
        await until(lambda: log(directory, "attention-1").split() == ["began", "called", "attention-1"])
        assert record(directory) is None and record(directory, "attention-1").role == "attention"
        os.kill(node.pid, signal.SIGTERM)
        await local.changed()
        assert (await local.instances())[0].exit_code == -signal.SIGTERM


async def test_what_an_earlier_node_of_that_name_logged_stays(directory, provider):
    async with provider() as local:
        await one_standby(local, directory)
        (directory / "logs" / "attention-1.log").write_text("earlier\n")
        await local.start("attention-1")
        await until(
            lambda: log(directory, "attention-1").split() == ["earlier", "began", "called", "attention-1"]
        )
        assert not log(directory)


async def test_one_that_was_taken_or_died_is_replaced(directory, provider):
    async with provider() as local, Keeping(local):
        first = await until(lambda: record(directory))
        await until(lambda: "began" in log(directory))
        await asyncio.sleep(0.3)
        await local.start("attention-1")
        second = await until(lambda: (r := record(directory)) and r.pid != first.pid and r)
        assert processes.is_alive(first)
        os.kill(second.pid, signal.SIGKILL)
        third = await until(lambda: (r := record(directory)) and r.pid not in (first.pid, second.pid) and r)
        assert processes.is_alive(third)
        assert [instance.id for instance in await local.instances()] == ["attention-1"]


async def test_without_one_or_with_one_that_does_not_answer_a_node_is_started(directory, provider):
    async with provider() as local:
        waiting = await one_standby(local, directory)
        os.kill(waiting.pid, signal.SIGSTOP)
        await local.start("attention-1")
        await local.start("attention-2")
        assert waiting.pid not in {node.pid for node in await local.instances()}
        assert len(await local.instances()) == 2
        await until(lambda: not processes.is_alive(waiting))
        assert record(directory) is None


async def test_the_next_provider_takes_over_the_standby_and_ends_those_too_many(directory, provider):
    async with provider() as local:
        waiting = await one_standby(local, directory)
    assert processes.is_alive(waiting)
    async with provider() as local:
        await local.start("attention-1")
        assert (await local.instances())[0].pid == waiting.pid
        waiting = await one_standby(local, directory)
    async with provider(num_standbys=0) as local, Keeping(local):
        await until(lambda: not processes.is_alive(waiting))
        await until(lambda: record(directory) is None)


async def test_a_standby_that_always_dies_is_tried_ever_more_slowly(directory, provider):
    def command(node):
        return (sys.executable, "-c", f"open({str(directory / 'starts')!r}, 'a').write('x')")

    async with provider(command=command) as local, Keeping(local):
        await asyncio.sleep(2.5)
        assert 1 <= len((directory / "starts").read_text()) < 12


async def test_standbys_end_with_the_rest_of_the_cluster(directory, provider):
    async with provider() as local:
        waiting = await one_standby(local, directory)
        kill_all(RecordDir(directory / "run"))
        await until(lambda: not processes.is_alive(waiting))


@pytest.mark.parametrize("called", [True, False], ids=["called", "not called yet"])
async def test_a_standby_whose_taker_died_before_writing_its_record_is_the_node(directory, provider, called):
    async with provider() as local:
        waiting = await one_standby(local, directory)
    records = RecordDir(directory / "run")
    log_file = str(directory / "logs" / "attention-1.log")
    records.begin(Intent(id="attention-1", role="attention", argv=("x",), log=log_file, standby=waiting.id))
    if called:
        await call(abstract_name(waiting.id, records.path), "attention-1")
    async with provider() as local:
        (node,) = await local.instances()
        assert (node.id, node.pid, node.running) == ("attention-1", waiting.pid, True)
        await until(lambda: "called attention-1" in log(directory))
        assert record(directory) is None and record(directory, "attention-1").pid == waiting.pid
        await local.start("attention-2")
        assert {item.pid for item in await local.instances() if item.id == "attention-1"} == {waiting.pid}
        assert processes.is_alive(waiting), "it is not taken for a standby that does not answer"
