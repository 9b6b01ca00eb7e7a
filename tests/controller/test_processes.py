import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import msgspec
import pytest
from flume_controller import processes
from flume_controller.processes import RecordDir, record_of

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('up', flush=True); time.sleep(60)",
]
PARENT = [
    sys.executable,
    "-c",
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "print(child.pid, flush=True); time.sleep(60)",
]


@pytest.fixture
def run(tmp_path):
    """Start a process and wait for its first line; killed at the end."""
    children = []

    def start(argv):
        log = tmp_path / f"{len(children)}.log"
        child = processes.spawn(argv, log)
        children.append(child)
        while not log.read_text().endswith("\n"):
            time.sleep(0.01)
        return child, record_of(child.pid, id="x", role="attention", log=log)

    yield start
    for child in children:
        child.kill()
        child.wait()


def test_a_process_is_known_again_by_pid_and_start_time(run):
    _, record = run(SLEEP)
    assert processes.is_alive(record)
    assert not processes.is_alive(msgspec.structs.replace(record, start_ticks=record.start_ticks + 1))
    assert not processes.is_alive(msgspec.structs.replace(record, boot_id="another boot"))


def test_a_process_that_waits_to_be_reaped_is_not_alive(run):
    child, record = run(SLEEP)
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, not reaped
    assert not processes.is_alive(record)


def test_a_pid_that_went_to_somebody_else_is_left_alone(run):
    child, record = run(SLEEP)
    stale = msgspec.structs.replace(record, start_ticks=record.start_ticks - 5)
    assert not processes.send(stale, signal.SIGKILL)
    processes.kill_session(stale)
    asyncio.run(processes.stop(stale, grace_s=0.1))
    assert child.poll() is None and processes.is_alive(record)


async def test_waiting_for_the_end_sees_it_at_once(run):
    child, record = run(SLEEP)
    waiting = asyncio.create_task(processes.wait_ended(record))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    child.kill()
    async with asyncio.timeout(2):
        await waiting
        await processes.wait_ended(record)  # and again, as it is over


async def test_a_process_that_ignores_sigterm_is_killed_after_the_grace(run):
    child, record = run(STUBBORN)
    began_s = time.monotonic()
    await processes.stop(record, grace_s=0.3)
    assert 0.3 <= time.monotonic() - began_s < 5
    assert child.wait() == -signal.SIGKILL


async def test_a_process_that_ends_on_sigterm_gets_no_sigkill(run):
    child, record = run(SLEEP)
    await processes.stop(record, grace_s=30)
    assert child.wait() == -signal.SIGTERM


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


async def test_stopping_takes_the_children_along(run):
    child, record = run(PARENT)
    grandchild = int(Path(record.log).read_text())  # noqa: ASYNC240
    await processes.stop(record, grace_s=5)
    child.wait()
    assert not is_running(grandchild)


def test_records_survive_in_files_and_half_written_ones_are_ignored(tmp_path, run):
    _, record = run(SLEEP)
    records = RecordDir(tmp_path / "run")
    assert records.all() == []
    records.save(record)
    (records.path / "broken.json").write_text('{"id": "bro')
    assert records.all() == [record]
    records.remove("x")
    records.remove("x")
    assert records.load("x") is None
