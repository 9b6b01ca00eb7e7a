import asyncio
import os
import signal
import sys

import pytest
from flume_controller.processes import RecordDir
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
