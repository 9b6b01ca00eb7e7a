import asyncio

import pytest
from flume_common.backoff import Backoff
from flume_common.tasks import background


async def forever():
    await asyncio.Event().wait()


async def failing(error, after_s=0.0):
    await asyncio.sleep(after_s)
    raise error


async def test_a_background_task_ends_with_its_block():
    seen = []

    async def note_end():
        try:
            await forever()
        finally:
            seen.append(asyncio.current_task().get_name())

    async with background(note_end=note_end()):
        await asyncio.sleep(0)
        assert not seen
    assert seen == ["note-end"]


async def test_an_error_of_the_body_comes_out_as_itself():
    with pytest.raises(KeyError, match="body"):
        async with background(idle=forever()):
            raise KeyError("body")


async def test_an_error_of_a_task_cancels_the_body_and_comes_out_as_itself():
    with pytest.raises(KeyError, match="task"):
        async with background(bad=failing(KeyError("task")), idle=forever()):
            await asyncio.sleep(30)


async def test_several_errors_come_out_together():
    with pytest.raises(ExceptionGroup) as caught:
        async with background(one=failing(KeyError()), two=failing(OSError())):
            await asyncio.sleep(30)
    assert {type(error) for error in caught.value.exceptions} == {KeyError, OSError}


async def test_cancelling_from_outside_is_no_error():
    async def body():
        async with background(idle=forever()):
            await asyncio.sleep(30)

    task = asyncio.create_task(body())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_backoff_grows_to_its_cap_and_starts_anew():
    backoff = Backoff(first_s=1.0, cap_s=4.0)
    for ceiling_s in (1, 2, 4, 4, 4):
        draws = backoff.next_s()
        assert 0 <= draws <= ceiling_s
    backoff.reset()
    assert backoff.next_s() <= 1.0


def test_backoff_draws_from_the_whole_interval():
    draws = []
    for _ in range(300):
        backoff = Backoff(first_s=1.0)
        draws.append(backoff.next_s())
    assert min(draws) < 0.1
    assert max(draws) > 0.9
