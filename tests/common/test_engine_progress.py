"""An engine shows what it does in memory; its supervisor reads it and judges, against real processes."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import asynccontextmanager

import msgspec
import pytest
from flume_common import engine_link
from flume_common.engine_link import LinkClosed, run_engine
from flume_common.engine_progress import Activity, ProgressPage, activity_message, make_page, work_done
from flume_common.tasks import background


class Do(msgspec.Struct, tag=True):
    what: str
    seconds: float


CHILD = """
    import select, sys, time
    import msgspec
    from flume_common.engine_link import EngineLink, LinkClosed
    from flume_common.engine_progress import Activity

    class Do(msgspec.Struct, tag=True):
        what: str
        seconds: float

    def busy(seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass

    def layers(seconds):
        for layer in range(20):
            link.progress.reached(layer)
            time.sleep(seconds / 20)

    link = EngineLink(int(sys.argv[sys.argv.index("--link-fd") + 1]), Do)
    while True:
        select.select([link], [], [])
        try:
            messages = link.receive()
        except LinkClosed:
            sys.exit(0)
        for message in messages:
            match message.what:
                case "step":
                    link.progress.begin_step(41, 20, 512, 3)
                    layers(message.seconds)
                case "hang":
                    link.progress.begin_step(42, 20, 512, 3)
                    time.sleep(message.seconds)
                case "load":
                    link.progress.begin(Activity.LOADING, 1000)
                    link.progress.reached(250)
                    busy(message.seconds)
                case "stuck load":
                    link.progress.begin(Activity.LOADING, 1000)
                    time.sleep(message.seconds)
            link.progress.idle()
            link.send(message)
"""


@pytest.fixture
def engine(tmp_path, monkeypatch):
    (tmp_path / "flume_test_worker.py").write_text(textwrap.dedent(CHILD))
    monkeypatch.setattr(engine_link, "_LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(engine_link, "PREPARE_S", 1.5)

    @asynccontextmanager
    async def run(silence_s=0.8):
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        async with run_engine("flume_test_worker", (), inbox=Do, env={"PYTHONPATH": path}) as link:
            link.send(Do("nothing", 0))
            assert await asyncio.wait_for(link.receive(), 20) == Do("nothing", 0)
            async with background(watch=link.watch(lambda: silence_s)):
                yield link

    return run


async def test_a_step_that_goes_on_may_last_many_times_the_silence(engine):
    async with engine() as link:
        link.send(Do("step", 4.0))
        await asyncio.sleep(1.5)
        seen = link.progress
        assert (seen.activity, seen.step, seen.total) == (Activity.STEPPING, 41, 20)
        assert (seen.prefill_tokens, seen.sequences) == (512, 3)
        assert 3 <= seen.done <= 12 and 1.0 < seen.activity_s < 3.0 and seen.quiet_s < 0.7
        assert await asyncio.wait_for(link.receive(), 10) == Do("step", 4.0)
        await asyncio.sleep(0.3)
        assert link.progress.activity is Activity.IDLE and link.progress.quiet_s < 0.3


@pytest.mark.parametrize("how", ["stopped", "hangs"])
async def test_an_engine_that_stands_still_in_a_step_is_killed_within_the_silence(engine, how):
    async with engine() as link:
        link.send(Do("hang" if how == "hangs" else "step", 30.0))
        await asyncio.sleep(0.3)
        if how == "stopped":
            os.kill(link.pid, signal.SIGSTOP)
        began_s = time.monotonic()
        with pytest.raises(LinkClosed):
            await asyncio.wait_for(link.receive(), 10)
        assert time.monotonic() - began_s < 3


async def test_an_idle_engine_makes_progress(engine):
    async with engine() as link:
        await asyncio.sleep(2.0)
        assert link.process.returncode is None and link.progress.quiet_s < 0.5


async def test_work_of_the_process_counts_while_it_prepares(engine):
    async with engine(silence_s=0.3) as link:
        link.send(Do("load", 4.0))
        await asyncio.sleep(1.0)
        assert (link.progress.done, link.progress.total) == (250, 1000)
        assert link.progress.quiet_s > 0.5
        assert await asyncio.wait_for(link.receive(), 10) == Do("load", 4.0)


async def test_preparing_without_any_work_is_hanging_after_a_while(engine):
    async with engine(silence_s=0.3) as link:
        link.send(Do("stuck load", 60.0))
        began_s = time.monotonic()
        with pytest.raises(LinkClosed):
            await asyncio.wait_for(link.receive(), 10)
        assert 1.0 < time.monotonic() - began_s < 6


def test_both_ends_see_one_page():
    ours, fd = make_page()
    theirs = ProgressPage(fd)
    assert ours.read().activity is Activity.STARTING
    theirs.begin(Activity.LOADING)
    theirs.reached(3, 10)
    seen = ours.read()
    assert (seen.activity, seen.done, seen.total, seen.preparing) == (Activity.LOADING, 3, 10, True)
    theirs.begin_step(7, 30, 64, 2)
    theirs.await_node(True)
    shown = activity_message(ours.read())
    assert (shown.activity, shown.step, shown.done, shown.total) == ("STEPPING", 7, 0, 30)
    assert shown.awaits_node and shown.quiet_s < 1
    theirs.turn()
    assert ours.read().activity is Activity.STEPPING, "a turn within a step ends nothing"
    theirs.idle()
    assert ours.read().activity is Activity.IDLE


def test_a_word_between_layers_costs_next_to_nothing():
    page = ProgressPage()
    began_s = time.perf_counter()
    for layer in range(10_000):
        page.reached(layer)
    assert (time.perf_counter() - began_s) / 10_000 < 20e-6


def test_work_of_a_process_is_seen_from_beside():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        before = work_done(busy.pid)
        time.sleep(0.5)
        assert work_done(busy.pid) > before
        busy.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        before = work_done(busy.pid)
        time.sleep(0.3)
        assert work_done(busy.pid) == before
    finally:
        busy.kill()
        busy.wait()
    assert work_done(busy.pid) == 0
