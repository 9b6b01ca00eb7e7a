"""Pulls that take long and steps that take long: neither counts as failed while something moves."""

import asyncio
import time
from types import SimpleNamespace

import pytest
from flume_attention import engine as engine_module
from flume_attention import messages as m
from flume_attention import pulling
from flume_attention.engine import Engine
from flume_common.engine_progress import ProgressPage
from flume_common.wire import sequence_key
from flume_protos.v1 import attention_pb2 as pb

RANGES = [pb.PulledRange(sequence="s", start=0, tokens=9), pb.PulledRange(sequence="s", start=9, tokens=9)]


class Puller:
    """A supervisor whose engine reads a piece every `pause_s`, `pieces` of them, and then `rest` ranges."""

    def __init__(self, pieces, pause_s, arrived):
        self.page, self.told = ProgressPage(), []
        self._pieces, self._pause_s, self._arrived = pieces, pause_s, arrived
        self._ended = asyncio.Event()

    @property
    def progress(self):
        return self.page.read()

    def tell(self, message):
        self.told.append(message)
        self._ended.set()

    async def ask(self, make, kind, *, timeout_s=10.0, give_up=None):
        make(7)
        if kind is m.Prepared:
            return m.Prepared(request=7, worker_address=b"", lane=1, layout=None, chunk_bytes=1)
        async with asyncio.timeout(timeout_s):
            for _ in range(self._pieces):
                await asyncio.sleep(self._pause_s)
                self.page.move()
            if self._arrived < len(RANGES):
                await self._ended.wait()
            return m.Pulled(
                request=7,
                ranges=[(r.start, sequence_key(r.sequence)) for r in RANGES[: self._arrived]],
                reason="",
            )


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    async def lend(*_):
        return pb.LendReply(epoch=1, worker_address=b"", lane=2)

    monkeypatch.setattr(pulling, "_lend", lend)
    monkeypatch.setattr(pulling, "STANDSTILL_S", 0.4)


async def read(puller, timeout_s=20.0):
    request = pb.PullRequest(weight_node="w", epoch=1, lender="b", lender_address="nowhere", ranges=RANGES)
    return await pulling.pull(puller, "a", 1, request, 1, timeout_s=timeout_s)


async def test_a_pull_that_goes_on_may_last_many_times_the_standstill():
    puller = Puller(pieces=8, pause_s=0.2, arrived=2)
    assert list((await read(puller)).ranges) == RANGES
    assert puller.told == []


async def test_a_pull_that_stands_still_is_ended_and_keeps_what_has_arrived():
    puller = Puller(pieces=3, pause_s=0.1, arrived=1)
    began_s = time.monotonic()
    assert list((await read(puller)).ranges) == RANGES[:1]
    assert puller.told == [m.EndPull(request=7)]
    assert time.monotonic() - began_s < 3


async def test_a_pull_whose_time_is_over_keeps_what_has_arrived():
    puller = Puller(pieces=100, pause_s=0.1, arrived=1)
    with pytest.raises(TimeoutError):
        await read(puller, timeout_s=1.0)
    assert m.EndPull(request=7) in puller.told


class Session:
    def __init__(self, name, *work_s):
        self.name, self.work_s, self.credits, self.changed = name, list(work_s), 0, False

    def advance(self):
        if not self.work_s:
            return False
        time.sleep(self.work_s.pop(0))
        return True

    def send_credit(self):
        self.credits += 1
        return True


def test_work_for_one_lane_that_takes_long_is_shown_to_the_others(monkeypatch):
    monkeypatch.setattr(engine_module, "LONG_WORK_S", 0.05)
    link = SimpleNamespace(progress=ProgressPage())
    node = SimpleNamespace(grant=list)
    engine = Engine(node, None, link, None)
    sessions = {
        name: Session(name, *work_s) for name, work_s in {"a": [0.1, 0.1], "b": [0.0], "c": []}.items()
    }
    engine._sessions.update(sessions)
    before_ns = link.progress.beat_ns
    while engine._work():
        pass
    assert [session.credits for session in sessions.values()] == [0, 2, 2]
    assert link.progress.beat_ns > before_ns
