import asyncio
import os
import signal
import sys

import psutil
import pytest
from flume_controller.processes import Intent, RecordDir
from flume_controller.providers.local import local_provider
from flume_controller.supervise import kill_all

SLEEP = (sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)")
STUBBORN = (
    sys.executable,
    "-c",
    "import signal, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('up', flush=True); time.sleep(60)",
)
FAIL = (sys.executable, "-c", "import sys; sys.exit('no such flag')")


def sleeping(node):
    return SLEEP


@pytest.fixture
def directory(tmp_path):
    yield tmp_path
    kill_all(RecordDir(tmp_path / "run"))


async def printed(log):
    async with asyncio.timeout(10):
        while not log.read_text():  # noqa: ASYNC110  (a file has no event)
            await asyncio.sleep(0.02)


async def ended(provider):
    async with asyncio.timeout(10):
        await provider.changed()


async def test_a_started_node_runs_and_its_output_is_kept(directory):
    async with local_provider(sleeping, directory) as provider:
        await provider.start("attention-1")
        (instance,) = await provider.instances()
        assert instance.running and os.getpgid(instance.pid) == instance.pid
        await printed(directory / "logs" / "attention-1.log")


async def test_starting_a_node_twice_starts_one_process(directory):
    async with local_provider(sleeping, directory) as provider:
        await provider.start("attention-1")
        await provider.start("attention-1")
        assert len(list((directory / "run").glob("*.json"))) == 1


async def test_a_node_that_dies_is_reported_with_its_exit_code(directory):
    async with local_provider(lambda node: FAIL, directory) as provider:
        await provider.start("attention-1")
        await ended(provider)
        (instance,) = await provider.instances()
        assert (instance.running, instance.stopping, instance.exit_code) == (False, False, 1)


async def test_a_stopped_node_ends_and_was_asked_to(directory):
    async with local_provider(sleeping, directory) as provider:
        await provider.start("attention-1")
        await provider.stop("attention-1")
        (instance,) = await provider.instances()
        assert instance.running and instance.stopping
        await ended(provider)
        (instance,) = await provider.instances()
        assert (instance.running, instance.exit_code) == (False, -signal.SIGTERM)


async def test_a_node_that_ignores_sigterm_is_killed_after_the_grace(directory):
    async with local_provider(lambda node: STUBBORN, directory, grace_s=0.2) as provider:
        await provider.start("attention-1")
        await printed(directory / "logs" / "attention-1.log")
        await provider.stop("attention-1")
        await ended(provider)
        assert (await provider.instances())[0].exit_code == -signal.SIGKILL


async def test_nodes_outlive_the_provider_and_the_next_one_adopts_them(directory):
    async with local_provider(sleeping, directory) as provider:
        await provider.start("attention-1")
        (before,) = await provider.instances()
    async with local_provider(sleeping, directory) as provider:
        (after,) = await provider.instances()
        assert after == before and after.running
        os.kill(after.pid, signal.SIGKILL)
        await ended(provider)
        (after,) = await provider.instances()
        assert not after.running


async def test_a_node_that_died_between_two_controllers_is_adopted_as_ended(directory):
    async with local_provider(sleeping, directory) as provider:
        await provider.start("attention-1")
        (before,) = await provider.instances()
    os.kill(before.pid, signal.SIGKILL)
    async with local_provider(sleeping, directory) as provider:
        await ended(provider)
        (after,) = await provider.instances()
        assert not after.running and not after.stopping


async def test_a_stop_that_was_under_way_is_carried_on_by_the_next_provider(directory):
    async with local_provider(lambda node: STUBBORN, directory, grace_s=60) as provider:
        await provider.start("attention-1")
        await printed(directory / "logs" / "attention-1.log")
        await provider.stop("attention-1")
    async with local_provider(lambda node: STUBBORN, directory, grace_s=0.2) as provider:
        await ended(provider)
        assert (await provider.instances())[0].stopping


async def test_only_an_ended_node_can_be_forgotten(directory):
    async with local_provider(sleeping, directory) as provider:
        await provider.start("attention-1")
        await provider.forget("attention-1")
        assert len(await provider.instances()) == 1
        await provider.stop("attention-1")
        await ended(provider)
        await provider.forget("attention-1")
        assert await provider.instances() == []
        assert not list((directory / "run").glob("*.json"))


async def test_a_command_that_does_not_exist_is_an_os_error(directory):
    async with local_provider(lambda node: ("/no/such/program",), directory) as provider:
        with pytest.raises(OSError, match="no/such/program"):
            await provider.start("attention-1")
        assert await provider.instances() == []


DIES_BEFORE_THE_RECORD = """
import asyncio, os, signal, sys
from pathlib import Path
from flume_controller import processes
from flume_controller.providers.local import local_provider

directory, *command = sys.argv[1:]

async def main():
    async with local_provider(lambda node: command, Path(directory)) as provider:
        processes.record_of = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        await provider.start("attention-1")

asyncio.run(main())
"""


@pytest.mark.parametrize("before", [(), ("env", "A=b")], ids=["as it is", "behind another program"])
async def test_a_process_whose_starter_died_before_writing_its_record_is_found(directory, before):
    command = (*before, *SLEEP, str(directory))
    starter = [sys.executable, "-c", DIES_BEFORE_THE_RECORD, str(directory), *command]
    died = await asyncio.create_subprocess_exec(*starter)
    assert await died.wait() == -signal.SIGKILL
    assert list((directory / "run").glob("*.json")) == []
    await printed(directory / "logs" / "attention-1.log")
    async with local_provider(lambda node: command, directory) as provider:
        (instance,) = await provider.instances()
        assert instance.id == "attention-1" and instance.running
        assert psutil.Process(instance.pid).cmdline()[-1] == str(directory)
        await provider.stop("attention-1")
        await ended(provider)


async def test_a_start_that_was_begun_and_came_to_nothing_is_forgotten(directory):
    RecordDir(directory / "run").begin(
        Intent(id="attention-1", role="attention", argv=("no", "such", "process"))
    )
    async with local_provider(sleeping, directory) as provider:
        assert await provider.instances() == []
        assert list((directory / "run").iterdir()) == []
