"""What a weight node says of a canary; the engine is played."""

import asyncio

import pytest
from flume_common.engine_progress import Activity, Progress
from flume_protos.v1 import weight_pb2 as pb
from flume_weight import messages as m
from flume_weight.canary import TOKENS, CanaryRunner, too_late
from flume_weight.errors import RequestRefused
from flume_weight.streams import Streams


def progress(activity=Activity.IDLE, *, step=0, quiet_s=0.0, awaited=False):
    return Progress(activity=activity, activity_s=1.0, quiet_s=quiet_s, step=step, awaited=awaited)


class Engine:
    """Answers a submission with these messages."""

    def __init__(self, *answers):
        self.streams = Streams()
        self.answers = answers
        self.submitted = []
        self.cancelled = []
        self.progress = progress()

    def submit(self, message):
        self.submitted.append(message)
        for make in self.answers:
            self.streams.deal(make(message.sequence))

    def cancel(self, sequence):
        self.cancelled.append(sequence)


def token(sequence):
    return m.Token(sequence, 7)


def finished(sequence):
    return m.Finished(sequence, "length", 3, TOKENS)


def failed(code, message):
    return lambda sequence: m.Failed(sequence, code, message)


async def test_two_tokens_are_a_proof():
    engine = Engine(token, token, finished)
    assert (await CanaryRunner(engine).run()).verdict == pb.CANARY_OK
    (submit,) = engine.submitted
    assert submit.canary and submit.sampling.max_tokens == TOKENS and submit.sampling.ignore_eos


@pytest.mark.parametrize(
    "code, verdict",
    [
        ("RESOURCE_EXHAUSTED", pb.CANARY_BUSY),
        ("UNAVAILABLE", pb.CANARY_FAILED),
        ("INTERNAL", pb.CANARY_FAILED),
    ],
)
async def test_an_end_with_an_error_is_a_failure_unless_there_is_no_room(code, verdict):
    outcome = await CanaryRunner(Engine(token, failed(code, "why"))).run()
    assert (outcome.verdict, outcome.reason) == (verdict, "why")


async def test_those_who_ask_at_the_same_time_share_one():
    engine = Engine()
    runner = CanaryRunner(engine)
    asked = [asyncio.create_task(runner.run()) for _ in range(3)]
    await asyncio.sleep(0.01)
    (submit,) = engine.submitted
    asked[0].cancel()
    engine.streams.deal(finished(submit.sequence))
    assert {(await item).verdict for item in asked[1:]} == {pb.CANARY_OK}
    again = asyncio.create_task(runner.run())
    await asyncio.sleep(0.01)
    engine.streams.deal(finished(engine.submitted[1].sequence))
    assert (await again).verdict == pb.CANARY_OK and len(engine.submitted) == 2


async def test_one_that_does_not_come_back_is_cancelled():
    engine = Engine(token)
    outcome = await CanaryRunner(engine).run(0.05)
    assert (outcome.verdict, engine.cancelled) == (pb.CANARY_FAILED, [engine.submitted[0].sequence])
    assert len(engine.streams) == 0


async def test_without_an_engine_it_fails():
    engine = Engine()

    def refuse(message):
        raise RequestRefused("UNAVAILABLE", "it is loading its model")

    engine.submit = refuse
    assert await CanaryRunner(engine).run() == (
        pb.CANARY_FAILED,
        "it is loading its model",
        pytest.approx(0, abs=1),
    )


@pytest.mark.parametrize(
    "before, after, verdict, says",
    [
        (progress(), progress(Activity.STEPPING, step=1), pb.CANARY_BUSY, "in step 1"),
        (progress(step=5), progress(step=90), pb.CANARY_BUSY, "in step 90"),
        (progress(), progress(Activity.PREPARING), pb.CANARY_BUSY, "prepares"),
        (
            progress(),
            progress(Activity.STEPPING, awaited=True),
            pb.CANARY_FAILED,
            "waits for an attention node",
        ),
        (progress(), progress(Activity.STEPPING, quiet_s=10), pb.CANARY_FAILED, "no progress"),
        (progress(), progress(step=1), pb.CANARY_FAILED, "idle"),
        (progress(), None, pb.CANARY_FAILED, "no engine"),
    ],
)
def test_what_is_late_has_failed_only_if_nothing_else_was_done(before, after, verdict, says):
    found, reason = too_late(before, after, 10)
    assert found == verdict and says in reason
