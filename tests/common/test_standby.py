import asyncio
import uuid

import pytest
from flume_common.standby import StandbyGone, call, until_called


@pytest.fixture
def name():
    return f"flume-test-{uuid.uuid4().hex}"


async def waiting(name, pid=7):
    task = asyncio.create_task(until_called(name, pid))
    await asyncio.sleep(0.05)
    return task


async def test_a_call_tells_the_standby_who_it_is_and_the_caller_which_process(name):
    task = await waiting(name)
    assert await call(name, "attention-3") == 7
    assert await asyncio.wait_for(task, 1) == "attention-3"


async def test_only_the_first_call_counts(name):
    task = await waiting(name)
    answers = await asyncio.gather(*(call(name, f"attention-{i}") for i in range(5)), return_exceptions=True)
    node = await asyncio.wait_for(task, 1)
    assert [f"attention-{i}" for i, answer in enumerate(answers) if answer == 7] == [node]
    with pytest.raises(StandbyGone):
        await call(name, "attention-9")


@pytest.mark.parametrize("said", [b"\n", b"{}\n", b'{"node": "no/slash"}\n', b"", b'{"node": 1}\n'])
async def test_what_is_no_call_changes_nothing(name, said):
    task = await waiting(name)
    reader, writer = await asyncio.open_unix_connection(f"\0{name}")
    writer.write(said)
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 1) == b""
    writer.close()
    assert not task.done()
    assert await call(name, "attention-3") == 7
    await task


async def test_nobody_there_is_told_at_once_and_silence_in_time(name):
    with pytest.raises(StandbyGone):
        await call(name, "attention-3")
    server = await asyncio.start_unix_server(lambda reader, writer: None, f"\0{name}")
    async with server:
        with pytest.raises(StandbyGone, match=r"0\.1 s"):
            await call(name, "attention-3", timeout_s=0.1)
