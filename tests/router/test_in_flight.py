"""Deadlines, and the last requests before leaving."""

import asyncio
from collections import deque

import pytest
from flume_router.errors import DeadlineExceeded, Overloaded, ShuttingDown
from flume_router.in_flight import InFlight, retry_after_s


async def hold(in_flight, seconds, log):
    try:
        async with in_flight.request():
            await asyncio.sleep(seconds)
        log.append("done")
    except (DeadlineExceeded, ShuttingDown) as error:
        log.append(type(error).__name__)


async def test_a_request_over_its_deadline_is_ended():
    with pytest.raises(DeadlineExceeded, match=r"longer than the 0\.05 s"):
        async with InFlight(0.05).request():
            await asyncio.sleep(5)


async def test_a_timeout_of_the_work_itself_is_not_taken_for_the_deadline():
    with pytest.raises(TimeoutError):
        async with InFlight(5).request():
            raise TimeoutError


async def test_draining_waits_for_open_requests():
    in_flight, log = InFlight(5), []
    held = asyncio.create_task(hold(in_flight, 0.1, log))
    await asyncio.sleep(0)
    await in_flight.drain(5)
    await held
    assert log == ["done"]
    assert len(in_flight) == 0


async def test_draining_ends_what_takes_too_long():
    in_flight, log = InFlight(30), []
    held = asyncio.create_task(hold(in_flight, 30, log))
    await asyncio.sleep(0)
    await asyncio.wait_for(in_flight.drain(0.05), 1)
    await asyncio.wait_for(held, 1)
    assert log == ["ShuttingDown"]


async def test_draining_takes_no_new_requests():
    in_flight = InFlight(5)
    await in_flight.drain(0)
    with pytest.raises(ShuttingDown):
        async with in_flight.request():
            pass


async def test_a_new_deadline_counts_for_requests_to_come_and_not_for_open_ones():
    in_flight, log = InFlight(0.4), []
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(hold(in_flight, 0.2, log))
        await asyncio.sleep(0.02)
        in_flight.deadline_s = 0.05
        tasks.create_task(hold(in_flight, 5, log))
    assert log == ["DeadlineExceeded", "done"]


async def test_so_many_may_wait_for_their_first_token():
    in_flight = InFlight(5, max_waiting=2)
    async with in_flight.request() as first, in_flight.request() as second, in_flight.request() as third:
        first.wait()
        second.wait()
        with pytest.raises(Overloaded, match=r"2 requests wait .* already; try again in 1 s"):
            third.wait()
        with pytest.raises(Overloaded):
            async with in_flight.request():
                pass
        second.started()
        second.started()
        third.wait()
        assert in_flight.waiting == 2
    assert in_flight.waiting == 0


def test_a_refused_client_hears_when_there_may_be_room():
    assert retry_after_s(100, deque()) == 1
    assert retry_after_s(100, deque([7.0])) == 1
    assert retry_after_s(10, deque([5.0, 6.0, 7.0])) == 10
    assert retry_after_s(10, deque([5.0, 5.1])) == 1
    assert retry_after_s(1000, deque([5.0, 6.0])) == 60
