"""The supervisor over a fake engine that says what the test tells it to."""

import asyncio
import time
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio
from flume_attention import messages as m
from flume_attention import supervisor as module
from flume_attention.errors import AttachRefused, EngineBusy, EngineGone
from flume_attention.supervisor import Supervisor
from flume_common.engine_link import LinkClosed
from flume_common.engine_progress import Activity, ProgressPage
from flume_common.layout import KvLayout
from flume_common.membership import State
from flume_common.tasks import background


class FakeEngine:
    def __init__(self, pid):
        self.pid = pid
        self.process = self
        self.returncode = -9
        self.killed_because = ""
        self.sent = []
        self.silence_s = None
        self.page = ProgressPage()
        self.outbox = asyncio.Queue()
        self.outbox.put_nowait(m.Started(main_at_s=time.monotonic(), phases_ms={"port": 1.0}))

    @property
    def progress(self):
        return self.page.read()

    def send(self, message):
        self.sent.append(message)

    async def receive(self):
        message = await self.outbox.get()
        if message is None:
            raise LinkClosed("killed")
        return message

    async def watch(self, silence_s):
        self.silence_s, self.patience_s = silence_s(), silence_s
        await asyncio.Event().wait()

    def die(self):
        self.outbox.put_nowait(None)


async def until(condition):
    async with asyncio.timeout(5):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


@pytest.fixture
def engines(monkeypatch):
    started = []

    @asynccontextmanager
    async def run_engine(*_, **__):
        started.append(FakeEngine(len(started)))
        yield started[-1]

    monkeypatch.setattr(module, "run_engine", run_engine)
    return started


@pytest_asyncio.fixture
async def supervisor(engines):
    supervisor = Supervisor([], silence_s=7.0)
    assert supervisor.state is State.PREPARING
    async with background(engine=supervisor.keep_engine()):
        await until(lambda: supervisor.state is State.READY)
        yield supervisor


def ask(supervisor):
    request = lambda number: m.Ask(request=number)  # noqa: E731
    return asyncio.create_task(supervisor.ask(request, m.Report))


async def test_answers_find_their_questions_whatever_comes_between(engines, supervisor):
    first, second = ask(supervisor), ask(supervisor)
    await until(lambda: len(engines[0].sent) == 2)
    one, two = (message.request for message in engines[0].sent)
    engines[0].outbox.put_nowait(m.Report(request=two, used_tokens=2))
    engines[0].outbox.put_nowait(m.Report(used_tokens=9))
    engines[0].outbox.put_nowait(m.LaneClosed(weight_node="w", epoch=1, reason="gone"))
    engines[0].outbox.put_nowait(m.Report(request=one, used_tokens=1))
    assert ((await first).used_tokens, (await second).used_tokens) == (1, 2)


async def test_a_refusal_is_raised_to_who_asked(engines, supervisor):
    question = ask(supervisor)
    await until(lambda: engines[0].sent)
    engines[0].outbox.put_nowait(m.Refused(request=engines[0].sent[0].request, field="epoch", detail="old"))
    with pytest.raises(AttachRefused, match="old") as error:
        await question
    assert error.value.field == "epoch"


async def test_who_asked_an_engine_that_dies_hears_of_it_at_once(engines, supervisor):
    question = ask(supervisor)
    await until(lambda: engines[0].sent)
    engines[0].die()
    async with asyncio.timeout(1):
        with pytest.raises(EngineGone):
            await question


async def test_the_next_engine_starts_empty_and_knows_of_the_drain(engines, supervisor):
    engines[0].outbox.put_nowait(m.Report(used_tokens=5))
    draining = asyncio.create_task(supervisor.set_draining(True, leave_by_s=9.0))
    await until(lambda: supervisor.report.used_tokens == 5)
    engines[0].die()
    await draining
    await until(lambda: len(engines) == 2 and supervisor.state is State.DRAINING)
    assert supervisor.report == m.Report()
    assert [message.draining for message in engines[1].sent] == [True]
    await until(lambda: [engine.silence_s for engine in engines] == [7.0, 7.0])  # each is watched


async def test_a_drain_without_a_deadline_and_an_undrain_take_the_deadline_back(engines, supervisor):
    told = engines[0].sent
    for number, (draining, leave_by_s) in enumerate([(True, 9.0), (True, 0.0), (True, 9.0), (False, 0.0)]):
        call = asyncio.create_task(supervisor.set_draining(draining, leave_by_s=leave_by_s))
        await until(lambda told_so_far=number: len(told) > told_so_far)
        engines[0].outbox.put_nowait(m.Report(request=told[-1].request))
        await call
        assert (supervisor.draining, supervisor.leave_by_s) == (draining, leave_by_s)
    asked = [message.draining for message in told]
    assert asked == [True, True, True, False]


async def test_an_engine_that_is_busy_is_reported_as_it_last_said(engines, supervisor):
    engines[0].outbox.put_nowait(m.Report(used_tokens=5))
    assert (await supervisor.fresh_report()).used_tokens == 5


def attach(supervisor):
    layout = KvLayout(3, 4, 2, 16, "float32", 4)
    make = lambda number: m.Attach(  # noqa: E731
        request=number, weight_node="w", epoch=1, layout=layout, worker_address=b"", lane=1,
        max_step_tokens=1, max_step_sequences=1, kv_frame_bytes=1,
    )  # fmt: skip
    return asyncio.create_task(supervisor.attach(make))


def attached(number):
    return m.Attached(request=number, worker_address=b"", lane=1, capacity_blocks=1)


async def test_while_kernels_are_compiled_an_engine_may_be_silent_and_one_lane_is_asked_for(
    engines, supervisor, monkeypatch
):
    monkeypatch.setattr(module, "ATTACH_S", 0.1)
    (engine,) = engines
    first = attach(supervisor)
    await until(lambda: engine.sent)
    engine.outbox.put_nowait(m.Preparing(for_request=engine.sent[0].request))
    with pytest.raises(EngineGone, match="compiled"):
        await first
    assert engine.patience_s() == module.PREPARE_S
    with pytest.raises(EngineGone, match="compiled"):
        await attach(supervisor)
    assert len(engine.sent) == 1, "nothing more for it to do when it is back"
    monkeypatch.setattr(module, "ATTACH_S", 5.0)
    again = attach(supervisor)
    engine.outbox.put_nowait(attached(engine.sent[0].request))
    await until(lambda: len(engine.sent) == 2)
    assert engine.patience_s() == 7.0
    answer = attached(engine.sent[1].request)
    engine.outbox.put_nowait(answer)
    assert await again == answer


@pytest.mark.parametrize("works", [True, False])
async def test_an_engine_that_is_busy_is_told_from_one_that_stands_still(
    engines, supervisor, monkeypatch, works
):
    monkeypatch.setattr(module, "ATTACH_S", 0.2)
    engines[0].page.begin(Activity.STEPPING)
    if not works:
        await asyncio.sleep(0.3)
    waiting = attach(supervisor)
    with pytest.raises(EngineGone) as error:
        while not waiting.done():
            if works:
                engines[0].page.beat()
            await asyncio.sleep(0.02)
        await waiting
    assert isinstance(error.value, EngineBusy) is works


async def test_an_engine_that_dies_compiling_leaves_nothing_behind(engines, supervisor):
    first = attach(supervisor)
    await until(lambda: engines[0].sent)
    engines[0].outbox.put_nowait(m.Preparing(for_request=engines[0].sent[0].request))
    engines[0].die()
    with pytest.raises(EngineGone):
        await first
    await until(lambda: len(engines) == 2 and supervisor.state is State.READY)
    again = attach(supervisor)
    await until(lambda: engines[1].sent)
    assert engines[1].patience_s() == 7.0
    engines[1].outbox.put_nowait(attached(engines[1].sent[0].request))
    await again
